"""The bot's warnings, as the demonstration tells them."""

from __future__ import annotations

from simulator.botlog import warnings_told


def test_the_bots_warnings_are_told_with_their_questions(tmp_path):
    log, told = tmp_path / "bot.log", []
    log.write_text("")
    id, other = (f"@RBT#001 {chat} 17 4 1764000000" for chat in ("jared @TGS#a", "lin"))
    lines = [
        f"2025-11-24 22:27:01,123 INFO botserver {id}: answered, ai 1 ms",
        f"2025-11-24 22:27:01,123 WARNING botserver no answer for {id}: HTTP 401",
        "[2025-11-24 22:27:01 +0000] [13] [CRITICAL] WORKER TIMEOUT (pid:14)",
        f"2025-11-24 22:27:01,123 ERROR store message {other} failed: 80001",
        "Traceback (most recent call last):",
        "  ZeroDivisionError: division by zero",
        "2025-11-24 22:27:01,123 WARNING imbot it failed. Traceback:\\n  line 1",
    ]
    with warnings_told(log, lambda *told_of: told.append(told_of)):
        with log.open("a") as file:
            for line in lines:
                file.write(f"{line}\n")
    assert told == [
        ("no answer for jared → @RBT#001: HTTP 401", "17 4"),
        ("WORKER TIMEOUT (pid:14)", ""),
        (
            "message lin → @RBT#001 failed: 80001\n"
            "Traceback (most recent call last):\n"
            "  ZeroDivisionError: division by zero",
            "17 4",
        ),
        ("it failed. Traceback:\n  line 1", ""),
    ]
