"""What a member gets with its assignment: the processors of those on its node that wait."""

from __future__ import annotations

import asyncio

import pytest

from ssm_metarl.tuning.mailbox import _Mailbox


def threads(places: list[tuple[str, float, float]], working: list[int]) -> list[int]:
    """Of members that got assignments at once, when all had asked for one."""

    async def run() -> list[int]:
        mailbox = _Mailbox()
        for member, place in enumerate(places):
            await mailbox.place(member, *place)
        asked = [asyncio.create_task(mailbox.next(member, 0)) for member in range(len(places))]
        await asyncio.sleep(0)
        await mailbox.put({member: {"number": 1} for member in working})
        assert [await asked[member] for member in working] == [{"number": 1}] * len(working)
        found = [await mailbox.threads(member) for member in working]
        await mailbox.close()
        await asyncio.gather(*asked)
        return found

    return asyncio.run(run())


@pytest.mark.parametrize("over", [False, True])
def test_a_member_that_comes_back_ends_the_call_of_the_process_that_is_gone(over: bool) -> None:
    async def run() -> list[dict[str, object] | None]:
        mailbox = _Mailbox()
        await mailbox.place(0, "a", 1.0, 0.0)
        gone = asyncio.create_task(mailbox.next(0, 3))
        await asyncio.sleep(0)
        await mailbox.place(0, "b", 1.0, 0.0)
        back = asyncio.create_task(mailbox.next(0, -1))
        await asyncio.sleep(0)
        await (mailbox.close() if over else mailbox.put({0: {"number": 4}}))
        return await asyncio.gather(gone, back)

    assert asyncio.run(run()) == [None, None if over else {"number": 4}]


@pytest.mark.parametrize(
    ("places", "working", "expected"),
    [
        ([("a", 1.0, 0.0)] * 3, [0], [3]),
        ([("a", 1.0, 0.0)] * 3, [0, 1, 2], [1, 1, 1]),
        ([("a", 1.0, 0.0)] * 3, [0, 2], [1, 1]),
        ([("a", 1.0, 0.0)] * 4, [0, 2], [2, 2]),
        ([("a", 0.666, 0.0)] * 3, [1], [2]),  # two processors for three members
        ([("a", 0.333, 0.666)] * 2, [0], [1]),  # its own workers have theirs
        ([("a", 1.0, 2.0), ("a", 1.0, 2.0), ("b", 1.0, 2.0)], [0], [4]),
        ([("a", 1.0, 0.0), ("b", 1.0, 0.0)], [0], [1]),
    ],
)
def test_idle_processors_of_the_node_go_to_who_works(
    places: list[tuple[str, float, float]], working: list[int], expected: list[int]
) -> None:
    assert threads(places, working) == expected


def test_who_still_works_has_the_processors_of_who_has_ended() -> None:
    async def run() -> list[int]:
        mailbox, found = _Mailbox(), list[int]()
        for member in range(2):
            await mailbox.place(member, "a", 1.0, 0.0)
        asked = [asyncio.create_task(mailbox.next(member, 0)) for member in range(2)]
        await asyncio.sleep(0)
        await mailbox.put({0: {"number": 1}, 1: {"number": 1}})
        await asyncio.gather(*asked)
        found.append(await mailbox.threads(0))
        ended = asyncio.create_task(mailbox.next(1, 1))
        await asyncio.sleep(0)
        found.append(await mailbox.threads(0))
        await mailbox.close()
        await ended
        return found

    assert asyncio.run(run()) == [1, 2]
