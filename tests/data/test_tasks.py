"""Tasks: the same texts everywhere, right answers, a held-out split, and sequences that cut no example."""

import hashlib
import itertools

import numpy as np
import pytest

from mlx_transformer.data import load
from mlx_transformer.data.tasks import TASKS, Example, calculator, find_task, regression, scenes
from mlx_transformer.data.tasks.packing import encode_examples, pack, unmarked
from mlx_transformer.data.tokenizers import SymbolTokenizer, load_tokenizer
from mlx_transformer.data.tokenizers.training import task_tokenizer
from mlx_transformer.utils.errors import BadInput

everywhere = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
NAMES = ["recall", "copying", "regression", "sums", "sums_steps", "calculator", "scenes"]


def texts(task, count=200):
    return list(itertools.islice(task.train_texts(frozenset()), count))


def held_out(task, count=20):
    return [text for level in task.levels for text in task.held_out(level, count)]


@pytest.fixture
def short(cache, monkeypatch):
    """Generate a few hundred training texts of each task."""
    for task in TASKS.values():
        monkeypatch.setattr(type(task), "train_examples", 300)


DIGESTS = {
    "recall": "ba9cf1e9c856fc9d",
    "copying": "1b2ca9f56f31b137",
    "regression": "de75c3187dd7df59",
    "sums": "a5d0ae3670b7759a",
    "sums_steps": "8eec304240f96b31",
    "calculator": "ad2b7ad43eca33f9",
    "scenes": "2ebb26f30f46a20a",
}


def test_the_names():
    assert list(TASKS) == NAMES
    with pytest.raises(
        BadInput, match=r"task:sum is no task: expected one of task:recall, task:copying, .*task:scenes$"
    ):
        find_task("task:sum")


@everywhere
def test_the_bytes_are_the_same_everywhere(task):
    written = "\n".join([*texts(task, 100), *held_out(task, 5)])
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == DIGESTS[task.name]


@everywhere
def test_every_word_is_a_symbol_and_examples_of_a_level_have_prompts_of_one_length(task):
    tokenizer = task_tokenizer(task.name)
    for level in (*task.trained_levels, *task.levels):
        examples = [Example.read(text) for text in task.held_out(level, 20)]
        assert len({len(each.prompt) for each in examples}) == 1
        for each in examples:
            assert tokenizer.decode(tokenizer.encode(" ".join(each.words))) == " ".join(each.words)
            assert task.read_off or each.rest[-1] == task.end
    assert max(len(Example.read(text).words) for text in texts(task)) < 64  # a sequence of nano, with EOS


@everywhere
def test_no_training_text_is_held_out(task, short):
    data = load(f"task:{task.name}")

    def documents(tokens):
        ends = np.flatnonzero(tokens == ~data.eos_id)
        return [tuple(tokens[a:b]) for a, b in itertools.pairwise(ends)]

    train, valid = set(documents(data.train)), set(documents(data.valid))
    assert len(valid) == len(documents(data.valid)) == 250 * len(task.trained_levels)
    assert not train & valid


def answers(text):
    example = Example.read(text)
    return [word for word, scored in zip(example.words, example.scored, strict=True) if scored]


def test_recall_names_the_value_of_each_key():
    for text in held_out(TASKS["recall"]):
        words, scored = Example.read(text).words, Example.read(text).scored
        pairs = list(zip(words[::2], words[1::2], scored[1::2], strict=True))
        values = {key: value for key, value, asked in pairs if not asked}
        asked = [(key, value) for key, value, asked in pairs if asked]
        assert asked
        assert all(values[key] == value for key, value in asked)


def test_copying_repeats_what_is_shown_without_the_blanks():
    for text in held_out(TASKS["copying"]):
        shown = Example.read(text).prompt[1:-1]
        assert answers(text) == [*(word for word in shown if word != "_"), "."]


@pytest.mark.parametrize("name", ["sums", "sums_steps"])
def test_sums_are_right(name):
    for text in held_out(TASKS[name]):
        a, b = ("".join(part.split()) for part in " ".join(Example.read(text).prompt).rstrip(" =:").split("+"))
        final = TASKS[name].final(answers(text))
        assert final == [*str(int(a) + int(b)), "."]


def test_a_story_ends_with_the_result_of_its_call():
    task = TASKS["calculator"]
    for text in held_out(task):
        call = answers(text)[1 : answers(text).index("=")]
        result = calculator.answer(call)
        assert result == list(str(eval("".join(call))))
        assert task.final(Example.read(text).rest) == result
        assert f"=] {' '.join(result)} ) [" in text
    assert calculator.answer(["1", "+"]) == calculator.answer(["1", "+", "2", "-", "1"]) == []


def test_a_picture_shows_what_its_sentence_says():
    """The colored pixels of a cell are of the color and, moved by at most one pixel, of the shape in the sentence."""
    for text in (text for text in held_out(TASKS["scenes"]) if text.startswith("see")):
        words = Example.read(text).words
        picture = np.zeros((18, 18), int)
        for i, word in enumerate(words[1:37]):
            code = int(word[1:], 16)
            bits = np.array([code >> j & 1 for j in range(9)]).reshape(3, 3) * (code >> 9)
            picture[i // 6 * 3 : i // 6 * 3 + 3, i % 6 * 3 : i % 6 * 3 + 3] = bits
        objects = " ".join(answers(text)).removesuffix(" .").split(" ; ")
        cells = picture.reshape(3, 6, 3, 6).swapaxes(1, 2)
        assert (cells.max((2, 3)) > 0).sum() == len(objects)
        for _, color, shape, row, column in map(str.split, objects):
            cell = cells[scenes.ROWS.index(row), scenes.COLUMNS.index(column)]
            mask = np.array([[mark == "#" for mark in line] for line in scenes.SHAPES[shape]])
            shown = [cell[y : y + 5, x : x + 5] for y in (0, 1) for x in (0, 1)]
            assert any(np.array_equal(part, mask * scenes.COLORS[color]) for part in shown)
            assert (cell > 0).sum() == mask.sum()


def test_a_drawn_grid_holds_the_objects_of_the_sentence():
    for text in (text for text in held_out(TASKS["scenes"]) if text.startswith("draw")):
        grid = answers(text)[:-1]
        assert len(grid) == 9
        sentence = " ".join(Example.read(text).prompt[1:-1])
        listed = [
            f"a {cell.replace('-', ' ')} {scenes.ROWS[i // 3]} {scenes.COLUMNS[i % 3]}"
            for i, cell in enumerate(grid)
            if cell != "_"
        ]
        assert " ; ".join(listed) == sentence


def test_regression_bounds_on_a_line_that_its_points_leave_open_or_determine():
    task = TASKS["regression"]
    level = task.levels[0]

    def bounds(text):
        return task.bounds(level, [Example.read(text)])

    sure = bounds("0 y0 9 y27 0 y0 9 y28 0 y-1 9 y26 0 y1 0 [y0]")  # intercept 0, slope 3: all noises are seen
    assert sure["ceiling"] == pytest.approx(0.5)
    assert sure["least_squares"] == 1.0
    # one point: 19 intercepts by 7 slopes, of which those within the noise remain
    assert bounds("0 y0 9 [y27]")["ceiling"] < 0.2
    assert sure["floor"] == pytest.approx(max(_prior().values()))


def _prior():
    found = {}
    for a, b, x in itertools.product(regression.SLOPES, regression.INTERCEPTS, regression.INPUTS):
        for noise, p in regression.NOISE.items():
            y = a * x + b + noise
            found[y] = found.get(y, 0) + p / (7 * 19 * 10)
    return found


# Sequences


@everywhere
def test_packed_sequences_cut_no_example_and_hold_each_once(task):
    tokenizer, written = task_tokenizer(task.name), texts(task, 60)
    tokens = encode_examples(written, tokenizer)
    for seq_len in (64, 100):
        packed = pack(tokens, tokenizer.eos_id, seq_len, task.name)
        assert packed.dtype == np.int32
        assert (len(packed) - 1) % seq_len == 0
        found = []
        for sequence in packed[:-1].reshape(-1, seq_len):
            assert sequence[0] == ~tokenizer.eos_id
            found += " ".join(
                "|" if i == tokenizer.eos_id else tokenizer.token(i) for i in unmarked(sequence).tolist()
            ).split("|")
        assert [text.strip() for text in found if text.strip()] == [" ".join(Example.read(t).words) for t in written]
        assert np.array_equal(packed[packed >= 0], tokens[tokens >= 0])
        assert np.array_equal(
            pack(packed, tokenizer.eos_id, 80, task.name), pack(tokens, tokenizer.eos_id, 80, task.name)
        )


def test_a_sequence_shorter_than_an_example_is_refused():
    tokenizer = task_tokenizer("recall")
    with pytest.raises(BadInput, match="--seq-len 62 is too short for an example of task:recall: give at least 63"):
        pack(encode_examples(texts(TASKS["recall"], 3), tokenizer), 0, 62, "recall")


# Tokenizer and options


def test_the_tokenizer_is_saved_and_read(tmp_path):
    tokenizer = task_tokenizer("scenes")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, SymbolTokenizer)
    assert again.sha256 == tokenizer.sha256
    assert again.encode("see #000 #3ff red") == tokenizer.encode("see #000 #3ff red")
    assert tokenizer.encode("#3ff") == [tokenizer.vocab_size + 0x3FF]
    with pytest.raises(BadInput, match="'Once' is no symbol of task:scenes: expected words such as see draw"):
        tokenizer.encode("Once upon")
    (tmp_path / "tokenizer.symbols.json").write_text('{"symbols": ["a"]}')
    with pytest.raises(BadInput, match="expected the keys task, patches, tool and symbols"):
        load_tokenizer(tmp_path)


def test_what_does_not_go_with_a_task_is_refused():
    for options in ({"valid": "x.txt"}, {"stories": 3}, {"text_column": "text"}):
        with pytest.raises(BadInput, match="goes with a text; task:sums is generated, with its own split"):
            load("task:sums", **options)
    for options in ({"tokenizer": "word"}, {"vocab_size": 300}):
        with pytest.raises(BadInput, match="task:sums has a tokenizer of its own"):
            load("task:sums", **options)
