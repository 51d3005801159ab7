"""Folders of Hugging Face's and runs of ours, with random models, and checks that two models compute the same."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_transformer.generate import complete, decode
from mlx_transformer.generate.decoding import GREEDY
from mlx_transformer.run.commands import interop as command_line
from mlx_transformer.run.commands.interop import export_model
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.run.saved import save_model
from mlx_transformer.utils.errors import exit_cleanly
from tests.faults.runs import assert_bad, command

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
library = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install tokenizers")

LENGTH = 41  # of a text: longer than every window, and than the first training that a scaling stretches
CLASSES = {"gpt2": "GPT2Config GPT2LMHeadModel"}
CLASSES |= {kind.lower(): f"{kind}Config {kind}ForCausalLM" for kind in ("Llama", "Mistral", "Qwen3")}
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}


def byte_level(folder, end="<|endoftext|>"):
    """Write a tokenizer.json of 257 tokens, made as GPT-2's is."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=257, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([], trainer)
    made.save(str(folder / "tokenizer.json"))


def write_theirs(folder, kind, **numbers):
    """Write a random model of theirs to a folder; return the model."""
    torch.manual_seed(len(numbers))
    sizes = {"initializer_range": 0.4} if kind == "gpt2" else {"initializer_range": 0.3, **SIZES}
    config, model = (getattr(transformers, name) for name in CLASSES[kind].split())
    model = model(config(**{"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0, **sizes, **numbers})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    byte_level(folder)
    return model


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def change(folder, **values):
    (folder / "config.json").write_text(json.dumps({**read_config(folder), **values}))


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.array(tokens))).logits.numpy()


def their_greedy(model, ids, count):
    with torch.no_grad():
        tokens = torch.tensor([ids])
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(ids) :].tolist()


def greedy(model, ids, count):
    return [drawn[0] for drawn in decode(model, [ids], count)]


def weights(model):
    return dict(tree_flatten(model.parameters()))


def assert_same(ours, theirs, length, vocabulary):
    """Check that logits agree within 1e-4 and greedy continuations are equal."""
    tokens = mx.random.randint(0, vocabulary, (2, length), key=mx.random.key(1))
    np.testing.assert_allclose(np.array(ours(tokens)), their_logits(theirs, tokens), atol=1e-4)
    start = tokens[0, :3].tolist()
    assert greedy(ours, start, length - 3) == their_greedy(theirs, start, length - 3)


def assert_same_text(ours, tokenizer, theirs, folder, length):
    """Check that greedy texts are equal, each through its own tokenizer and its own generate."""
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in ("the cat 123", "a", "né 🙂"):
        completion = complete(ours, tokenizer, [prompt], sampling=GREEDY)[0]
        given = auto(prompt, return_tensors="pt")
        written = theirs.generate(**given, do_sample=False, max_length=length, eos_token_id=tokenizer.eos_id)[0]
        end = [tokenizer.eos_id] * completion.ended
        assert written.tolist() == [*given.input_ids[0].tolist(), *completion.tokens, *end]


def write_ours(folder, tokenizer, phase, branch=None, **numbers):
    """Write a run of ours with a perturbed model that generates no lone bytes; return the model."""
    kind = find_branch(find_phase(phase), branch)
    sizes = {"d_model": 15, "n_layers": 2, "n_heads": 3, "d_ff": 22, "seq_len": 30, "max_len": 37}
    sizes |= {"n_heads": 5, "head_dim": 8} if phase == 5 else {}
    model = kind(kind.Config(**{"vocab_size": tokenizer.vocab_size, **sizes, **numbers}))
    model.update(tree_map(lambda w: w + 0.3 * mx.random.normal(w.shape), model.parameters()))
    lone = mx.array([tokenizer.token(i).startswith("<") for i in range(tokenizer.vocab_size)])
    for table in (model.embedding, model.head):
        if "weight" in table:
            table.weight = mx.where(lone[:, None], 0.0, table.weight)
    model.eval()
    save_model(folder / "model", model, tokenizer, phase, branch)
    return model


def assert_mlx_lm_computes_the_same(ours, tokenizer, folder):
    """Export the run folder/run, and check logits and greedy text of the model that mlx-lm loads."""
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")
    assert "mlx-lm can hold it too" in export_model(folder / "run", folder / "theirs")
    theirs, their_tokenizer = mlx_lm.load(str(folder / "theirs"))
    tokens = mx.random.randint(0, tokenizer.vocab_size, (2, 37), key=mx.random.key(1))
    np.testing.assert_allclose(np.array(theirs(tokens)), np.array(ours(tokens)), atol=1e-4)
    completion = complete(ours, tokenizer, ["the cat"], sampling=GREEDY, max_tokens=12)[0]
    assert mlx_lm.generate(theirs, their_tokenizer, "the cat", max_tokens=12) == completion.continuation


def interop(*args):
    return command(lambda: exit_cleanly(command_line.main), *args)


def refused(theirs, *said):
    """Check that an import fails with one sentence and leaves nothing behind."""
    target = theirs.parent / "run"
    assert_bad(interop("import", theirs, target), *said)
    assert not target.exists()
    assert not [path for path in theirs.parent.iterdir() if path.name.startswith(".")]
