import pytest

from ipu_pipeline.checkpoint import write_checkpoint
from tests.checkpoint.models import adamw, bert, one_step


@pytest.fixture
def trained():
    model = bert()
    optimizer = adamw(model, groups=2)
    for seed in range(2):
        one_step(model, optimizer, seed)
    return model, optimizer


@pytest.fixture
def saved(trained, tmp_path):
    model, optimizer = trained
    return write_checkpoint(
        tmp_path / "c", model=model, optimizer=optimizer, global_step=7, extra={"note": [1, "a"]}
    )
