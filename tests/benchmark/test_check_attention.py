import pytest

from scripts.benchmark import check_attention as checked
from scripts.benchmark.settings import BenchmarkError


@pytest.mark.newest
def test_another_implementation_of_attention_passes_and_a_wrong_mask_ends_the_command(monkeypatch):
    """That of XLA in place of cuDNN; then one that ignores the mask."""
    result = checked.check_attention("xla")
    assert 0 < result.loss < 0.02
    assert 0 < result.gradients < 0.02

    def unmasked(q, k, v, visible, past, **others):
        return checked.attend(q, k, v, visible | True, past)

    monkeypatch.setattr(checked, "attend_by_cudnn", unmasked)
    with pytest.raises(BenchmarkError, match="the check of attention cudnn failed: it and its gr"):
        checked.check_attention()
