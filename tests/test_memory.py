"""Freed memory stays with the process."""

import pytest
from forked import fork

from rs_transformer.utils.memory import keep_freed_memory

CODE = """
from rs_transformer.utils.measuring import memory
from rs_transformer.utils.memory import keep_freed_memory
if {kept}:
    assert keep_freed_memory()
before = memory("VmRSS")
block = bytearray(200 * 2**20)
del block
print(memory("VmRSS") - before)
"""


@pytest.mark.parametrize(("kept", "stays"), [(True, 200), (False, 0)])
def test_freed_memory_is_kept_for_what_comes_next(kept, stays):
    assert float(fork("-c", CODE.format(kept=kept)).stdout) == pytest.approx(stays, abs=20)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()
