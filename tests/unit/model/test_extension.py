"""The lock of an extension's build: waited for while it may be alive, deleted when it cannot be."""

import os
import time

import megatron.core.tensor_parallel.random as random
import pytest

from megatron_hbp.model.extension import MODULES, NAME, drop_stale_lock
from megatron_hbp.model.recompute import FLAGS


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    path = tmp_path / NAME / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def test_it_is_the_lock_of_megatrons_extension(tmp_path, monkeypatch):
    asked = []

    def load_inline(**options):
        asked.append(options["name"])
        return random

    monkeypatch.setattr(random, "_share_storage_ext", None)
    monkeypatch.setattr(random, "load_inline", load_inline)
    monkeypatch.setattr(random, "share_storage", None, raising=False)
    random._get_share_storage()
    assert asked == [NAME] and set(FLAGS) > MODULES


def test_an_old_lock_is_deleted(lock, capsys):
    os.utime(lock, (time.time() - 400,) * 2)
    drop_stale_lock(["mlp", "layernorm"])
    assert not lock.exists() and str(lock) in capsys.readouterr().err


def test_a_new_lock_is_waited_for(lock):
    begun = time.monotonic()
    drop_stale_lock(["moe_act"], stale=1.5)
    assert not lock.exists() and time.monotonic() - begun > 1
    drop_stale_lock(["moe_act"])  # without a lock there is nothing to wait for


def test_who_does_not_need_it_or_is_not_the_first_leaves_it(lock, monkeypatch):
    os.utime(lock, (time.time() - 400,) * 2)
    drop_stale_lock(["mlp", "core_attn"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    drop_stale_lock(["layernorm"])
    assert lock.exists()
