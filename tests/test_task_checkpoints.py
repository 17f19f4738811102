"""Checkpoints of a run: at one stroke, the last few, and what happens to damaged ones."""

from __future__ import annotations

import pytest
import torch

from dla_fast.tasks import TaskError, checkpoints


def save(folder, *steps, keep=2):
    saved = checkpoints.Checkpoints(folder, keep)
    for step in steps:
        saved.save(step, {"step": step, "weight": torch.arange(1000.0) + step, "facts": {"lr": (0.1, None)}})
    return saved


def test_the_newest_comes_back(tmp_path):
    state = save(tmp_path / "made" / "later", 1, 2).newest(pytest.fail)
    assert state["step"] == 2
    assert torch.equal(state["weight"], torch.arange(1000.0) + 2)
    assert state["facts"] == {"lr": (0.1, None)}


def test_only_the_last_few_stay(tmp_path):
    saved = save(tmp_path, 1, 2, 10, 100, keep=3)
    assert [path.name for path in saved.paths()] == ["step-00000100.pth", "step-00000010.pth", "step-00000002.pth"]


def test_none_at_all(tmp_path):
    assert checkpoints.Checkpoints(tmp_path / "absent").newest(pytest.fail) is None


@pytest.mark.parametrize("size", [0, 1, 100, 0.5, 0.9, -1])
def test_a_truncated_one_is_noticed_and_the_one_before_taken(tmp_path, size):
    saved = save(tmp_path, 7, 8)
    newest = saved.paths()[0]
    content = newest.read_bytes()
    newest.write_bytes(content[: int(len(content) * size) if isinstance(size, float) else size])
    said = []
    assert saved.newest(said.append)["step"] == 7
    assert len(said) == 1
    assert str(newest) in said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_changed_bit_is_noticed(tmp_path, share):
    """torch.load does not look at checksums: it would give other weights."""
    saved = save(tmp_path, 7, 8)
    newest = saved.paths()[0]
    content = bytearray(newest.read_bytes())
    start = content.index(torch.arange(1000.0).add(8).numpy().tobytes())
    content[start + int(4000 * share)] ^= 1
    newest.write_bytes(content)
    assert torch.load(newest, weights_only=True)["step"] == 8
    said = []
    assert saved.newest(said.append)["step"] == 7
    assert "checksum" in said[0]


def test_all_damaged_is_an_error(tmp_path):
    saved = save(tmp_path, 7, 8)
    for path in saved.paths():
        path.write_bytes(b"")
    with pytest.raises(TaskError, match="all 2 checkpoints are damaged"):
        saved.newest(lambda line: None)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"step": Evil()}, tmp_path / "step-00000001.pth")
    with pytest.raises(TaskError, match="all 1 checkpoints"):
        checkpoints.Checkpoints(tmp_path).newest(lambda line: None)


def test_what_comes_after_is_forgotten_when_a_run_goes_on_from_before(tmp_path):
    saved = save(tmp_path, 7, 8)
    (tmp_path / ".step-00000009.pth.123").write_bytes(b"left behind")
    (tmp_path / "notes.txt").write_text("mine")
    saved.forget_after(7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000007.pth"]


def test_a_failed_save_leaves_the_last(tmp_path, monkeypatch):
    saved = save(tmp_path, 7)

    def fails(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="No space"):
        saved.save(8, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007.pth"]
