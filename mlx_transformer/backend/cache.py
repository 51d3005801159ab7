"""The folder for everything that can be made again: datasets, tokenizers, compiled kernels."""

import os
import tempfile
from pathlib import Path

from mlx_transformer.utils.errors import BadInput


def cache_dir() -> Path:
    """Return the cache folder, made if it is missing: $MLX_TRANSFORMER_CACHE, else mlx_transformer in the user's own.

    Falls back to a folder of this user in the temporary folder if that is not writable. Raises BadInput if neither is.
    """
    named = os.environ.get("MLX_TRANSFORMER_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    wanted = Path(named).expanduser().absolute() if named else home / "mlx_transformer"
    fallback = Path(tempfile.gettempdir()) / f"mlx_transformer-{os.getuid()}"
    if _writable(wanted):
        return wanted
    if _writable(fallback) and fallback.stat().st_uid == os.getuid():  # code is loaded from here: only this user's
        return fallback
    raise BadInput(f"the cache folder {wanted} cannot be written; set MLX_TRANSFORMER_CACHE to one that can")


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
