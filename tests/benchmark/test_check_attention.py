import pytest

from scripts.benchmark import check_attention as checked
from scripts.benchmark.settings import BenchmarkError


def test_attention_by_another_implementation_passes_and_a_wrong_one_ends_the_command(monkeypatch):
    """XLA's in place of cuDNN's; then one that sees what is hidden."""
    found = checked.check_attention("xla")
    assert 0 < found.loss < 0.02
    assert 0 < found.gradients < 0.02

    def blind(q, k, v, visible, past, **others):
        return checked.attend(q, k, v, visible | True, past)

    monkeypatch.setattr(checked, "attend_by_cudnn", blind)
    with pytest.raises(BenchmarkError, match="the check of attention cudnn failed: it and its gr"):
        checked.check_attention()
