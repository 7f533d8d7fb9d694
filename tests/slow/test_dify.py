"""Dify's conversations, over two processes that are killed."""

from __future__ import annotations

import random
import signal

import pytest
from conftest import poll, said_to
from test_processes import let_claims_lapse

from simulator import running

pytestmark = pytest.mark.slow


def test_conversations_outlive_two_processes_and_a_kill_9(tmp_path):
    about = {"WEB_CONCURRENCY": 2, "RATE_LIMIT": 0, "AI_PROVIDER": "dify"}
    with running(**about) as (sim, bot):
        names = [f"user{number}" for number in range(50)]
        sim.users |= {*names}
        for number in range(10):
            for name in names:
                sim.say(name, "@RBT#001", f"q{number}")
            if number == 0:
                sim.wait(50, timeout=60)
                sim.ai_delay = 60
        poll(lambda: len(sim.ai_requests) == 100)
        bot.stop(signal.SIGKILL)
        assert len(sim.delivered) == 50
        for id in random.sample([*sim.dify_conversations], 20):
            del sim.dify_conversations[id]
        sim.ai_delay = 0
        let_claims_lapse(bot.env["DATABASE_URL"].removeprefix("sqlite:///"))
        bot.start()
        sim.wait(500, timeout=60)
        for name in names:
            assert said_to(sim, name) == [f"q{number}" for number in range(10)]
        assert len(sim.delivered) == 500 and len(sim.dify_begun) == 70
        assert len(sim.ai_requests) == 550 and "Traceback" not in bot.log.read_text()
