"""The short form of tests/soak_serve.py."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from soak_serve import soak


def test_a_full_queue_loses_nothing_and_answers_nothing_twice() -> None:
    said = soak(60, most=120)
    clients, server = said["clients"], said["server"]
    assert not said["wrong"]
    assert said["answered twice"] == 0
    assert set(clients) <= {"ok", "full", "left"}
    assert clients["ok"]
    left = clients.get("left", 0)  # one that had its end before the client went counts as answered
    assert clients["ok"] <= server["ok"] <= clients["ok"] + left
    assert server["ok"] + server.get("cancelled", 0) == clients["ok"] + left
    assert said["idle"] and not any(list(said["load"].values())[:4])
