"""Fail unless each run's best validation loss lies well below what a unigram model reaches on the same tokens."""

import json
import sys
from pathlib import Path

from bench.tools.baselines import kneser_ney
from mlx_transformer.data.corpus import load_corpus
from mlx_transformer.data.tokenizers import load_tokenizer
from mlx_transformer.data.tokens import tokenize_corpus

for run in map(Path, sys.argv[1:]):
    flags = json.loads((run / "settings.json").read_text())["flags"]
    tokenizer = load_tokenizer(run / "model")
    tokens = tokenize_corpus(load_corpus(flags["data"], flags.get("valid"), flags.get("stories")), tokenizer)
    unigram = -kneser_ney(tokens.train, tokenizer.vocab_size, tokens.eos_id, order=1).log_prob(tokens.valid).mean()
    loss = json.loads((run / "result.json").read_text())["best_valid_loss"]
    print(f"{run.name}: validation loss {loss:.3f} nats per token, a unigram model {unigram:.3f}")
    if not loss < unigram - 1.0:
        sys.exit(f"{run.name}: the validation loss is less than 1 nat below a unigram model's")
