"""The precision that a process computes in, on CPUs with and without bf16 products of their own."""

from __future__ import annotations

import pytest
import torch

from clip_train.runtime import process
from clip_train.runtime.process import arithmetic, launched


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs")
@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bf16_where_it_can(native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "has_bf16_products", lambda: native)
    with launched("bf16") as here, here.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    assert here.precision == arithmetic("bf16") == ("bf16" if native else "fp32")


def test_other_precisions_are_what_was_asked_for():
    assert arithmetic("fp32") == "fp32" and arithmetic("fp16") == "fp16"
