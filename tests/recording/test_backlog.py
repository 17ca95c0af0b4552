"""Work in the background: in order, bounded, and no error lost."""

from __future__ import annotations

import threading

import pytest

from dora_dynamics.recording import backlog as module
from dora_dynamics.recording.backlog import LIMIT, Backlog


def test_everything_is_done_in_order() -> None:
    backlog, done = Backlog(), []
    for i in range(50):
        backlog.add(lambda i=i: done.append(i))  # type: ignore[misc]
    backlog.close()
    assert done == list(range(50))


def test_add_returns_before_the_work_is_done_and_wait_after() -> None:
    backlog, may_go, done = Backlog(), threading.Event(), []

    def work() -> None:
        assert may_go.wait(60)
        done.append(threading.current_thread())

    backlog.add(work)
    assert not done
    may_go.set()
    backlog.wait()
    assert len(done) == 1
    assert done[0] is not threading.current_thread()
    backlog.close()
    assert not done[0].is_alive()


def test_no_more_than_so_much_may_wait() -> None:
    backlog, may_go, added = Backlog(), threading.Event(), []

    def wait() -> None:
        assert may_go.wait(60)

    def fill() -> None:
        for i in range(LIMIT + 2):
            backlog.add(wait)
            added.append(i)

    thread = threading.Thread(target=fill)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert len(added) == LIMIT
    may_go.set()
    thread.join()
    backlog.close()
    assert len(added) == LIMIT + 2


def test_an_error_is_raised_by_the_next_call_and_the_rest_is_done() -> None:
    backlog, may_go, done = Backlog(), threading.Event(), []

    def fail() -> None:
        assert may_go.wait(60)
        raise OSError("disk full")

    backlog.add(fail)
    backlog.add(lambda: done.append(1))
    may_go.set()
    with pytest.raises(OSError, match="disk full"):
        backlog.wait()
    backlog.wait()
    assert done == [1]
    backlog.add(lambda: done.append(2))
    backlog.close()
    backlog.add(lambda: done.append(3))  # a thread anew
    backlog.close()
    assert done == [1, 2, 3]


def test_work_behind_a_device_leaves_a_moment_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause that nobody could sit out is cut short by more work and by who waits."""
    monkeypatch.setattr(module, "PAUSE", 3600.0)
    backlog, device, done = Backlog(), threading.Event(), threading.Event()
    backlog.add(done.set, device.wait)
    device.set()
    assert not done.wait(0.05)
    backlog.add(lambda: None)
    assert done.wait(60)
    backlog.wait()
    done.clear()
    backlog.add(done.set, device.wait)  # nothing is behind it any more
    assert not done.wait(0.05)
    backlog.wait()
    assert done.is_set()
    backlog.close()
