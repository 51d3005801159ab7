"""What makes MLX fast on a Linux CPU, and what the device is."""
