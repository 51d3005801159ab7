"""No pictures here: each takes half a second, and tests/run draws them."""

import pytest

from mlx_transformer.run import training


@pytest.fixture(autouse=True, scope="module")
def _no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_loss", lambda path, *_: path.touch())
        yield
