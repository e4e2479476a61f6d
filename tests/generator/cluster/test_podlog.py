"""Each line of a container's log is read once, whatever interrupts the stream.

The server is a list of answers, one for each request; the last answer is repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from generator.cluster.waiting import PATIENCE, until
from genvalues.cluster.api import Api
from genvalues.cluster.kinds import ApiError, NotAllowed
from genvalues.cluster.podlog import PodLog, text_of_line

A, B, C, D = (f"2026-01-01T00:00:0{second}.000000000Z {word}" for second, word in enumerate(("a", "b", "c", "d")))
LOST = "unable to retrieve container logs for containerd://1f89"
Answer = Sequence[str | Exception]


class Server:
    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []

    def log(self, pod: str, container: str, **options: Any) -> Iterator[str]:
        self.asked.append(options)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        for line in answer:
            if isinstance(line, Exception):
                raise line
            yield line


class Following:
    def __init__(self, *answers: Answer, **options: Any) -> None:
        self.server, self.lines = Server(*answers), list[str]()
        settings = {"interval": 0.005, "tail": None, **options}
        self.log = PodLog(cast(Api, self.server), "w-0", "pytorch", self.lines.append, **settings)

    def until(self, *lines: str) -> Following:
        self.log.start()
        until(lambda: self.lines == list(lines), f"{lines}, has {self.lines}")
        return self

    def end(self) -> Following:
        self.log.over.set()
        if not self.log.ident:
            self.log.start()
        self.log.join(PATIENCE)
        assert not self.log.is_alive()
        return self


@pytest.mark.parametrize(
    "broken", [(A, OSError("reset")), (A, ApiError(500, "x")), (A, ValueError("half an answer")), (A,), (LOST, A, LOST)]
)
def test_an_interrupted_stream_is_resumed_where_it_ended(broken: Answer) -> None:
    assert Following(broken, [A, B, LOST]).until("a", "b").end().lines == ["a", "b"]


def test_a_deleted_pod_ends_the_thread() -> None:
    following = Following([A], [ApiError(404, "not found")])
    following.log.start()
    following.log.join(PATIENCE)
    assert not following.log.is_alive() and following.lines == ["a"]


def test_a_last_request_reads_the_lines_up_to_the_end_without_following() -> None:
    following = Following([A], [A, B], tail=5).end()
    assert following.lines == ["a"] and [one["follow"] for one in following.server.asked] == [False]
    followed = Following([A], [A, B]).until("a", "b").end()
    assert followed.server.asked[0]["follow"] and not followed.server.asked[-1]["follow"]


def test_a_missing_permission_is_recorded_until_it_is_granted() -> None:
    assert str(Following([NotAllowed(403, "pods/log")]).end().log.refused) == "pods/log"
    assert Following([NotAllowed(403, "pods/log")], [A]).until("a").end().log.refused is None


def test_the_tail_limits_existing_lines_and_every_later_line_is_requested() -> None:
    following = Following([], [C], [C, D], tail=1).until("c", "d").end()
    assert [one["tail"] for one in following.server.asked[:3]] == [1, 1, None]
    assert {one["tail"] for one in following.server.asked[3:]} <= {None}


def test_without_every_no_more_than_the_tail_is_requested_after_an_interruption() -> None:
    following = Following([C], [C, D], tail=1, every=False).until("c", "d").end()
    assert {one["tail"] for one in following.server.asked} == {1}


def test_a_progress_bar_is_reduced_to_its_last_state() -> None:
    assert text_of_line("2026-01-01T00:00:00Z 10%\r20%\r") == "20%"
