"""Hugging Face's side of bench decode: `generate` of transformers as it is installed, driven by bench.child."""

from typing import Any

import torch
import transformers

from bench.reference import facts


class DecodingRounds:
    """Greedy decoding with the cache that `generate` makes, the same prompts each time."""

    def __init__(self, *, folder: str, prompts: list[list[int]], device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval()
        self.model.generation_config.eos_token_id = None  # so that none ends early, and no time goes into looking
        self.prompts = torch.tensor(prompts, device=device)
        self.seen = torch.ones_like(self.prompts)

    def facts(self) -> dict[str, Any]:
        return facts(self.device, self.threads) | {"transformers": transformers.__version__}

    def round(self, count: int) -> dict[str, Any]:
        """The next pieces of every prompt."""
        with torch.inference_mode():
            pieces = self.model.generate(
                self.prompts,
                attention_mask=self.seen,
                do_sample=False,
                use_cache=True,
                max_new_tokens=count,
                pad_token_id=0,
            )
        return {"pieces": pieces[:, -count:].tolist()}
