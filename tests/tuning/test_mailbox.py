"""What a member gets with its assignment: the processors of those on its node that wait."""

from __future__ import annotations

import asyncio

import pytest

from ssm_metarl.tuning.mailbox import _Mailbox


def threads(places: list[tuple[str, float, float]], working: list[int]) -> list[int]:
    """Of members that get assignments at once, when all have asked for one."""

    async def run() -> list[int]:
        mailbox = _Mailbox()
        for member, place in enumerate(places):
            await mailbox.place(member, *place)
        asked = [asyncio.create_task(mailbox.next(member, 0)) for member in range(len(places))]
        await asyncio.sleep(0)
        await mailbox.put({member: {"number": 1} for member in working})
        found = [await asked[member] for member in working]
        await mailbox.close()
        await asyncio.gather(*asked)
        return [each["threads"] for each in found if each]

    return asyncio.run(run())


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
