"""The worker of `bench decode` for Hugging Face: `generate` of the installed transformers."""

from typing import Any

import torch
import transformers

from bench.reference import facts


class DecodingRounds:
    """Greedy decoding of the same prompts with the cache that `generate` makes."""

    def __init__(self, *, folder: str, prompts: list[list[int]], device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval()
        self.model.generation_config.eos_token_id = None  # no sequence ends early
        self.prompts = torch.tensor(prompts, device=device)
        self.mask = torch.ones_like(self.prompts)

    def facts(self) -> dict[str, Any]:
        """Describe the runtime."""
        return facts(self.device, self.threads) | {"transformers": transformers.__version__}

    def round(self, count: int) -> dict[str, Any]:
        """Decode the next tokens (B, count) of every prompt."""
        with torch.inference_mode():
            tokens = self.model.generate(
                self.prompts,
                attention_mask=self.mask,
                do_sample=False,
                use_cache=True,
                max_new_tokens=count,
                pad_token_id=0,
            )
        return {"tokens": tokens[:, -count:].tolist()}
