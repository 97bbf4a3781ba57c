"""One line about the conversation: how full its context is, and how fast the answers come."""

_WIDTH = 10  # cells of the meter's bar


def meter(used: int, total: int) -> str:
    """As in 1234/4096 ▓▓▓░░░░░░░ 30 %"""
    full = min(_WIDTH, round(_WIDTH * used / total))
    return f"{used}/{total} {'▓' * full}{'░' * (_WIDTH - full)} {100 * used // total} %"


def line(used: int, total: int, speed: float = 0.0, hint: str = "") -> str:
    """speed: tokens a second, 0 = not known."""
    return " · ".join(filter(None, (meter(used, total), f"{speed:.1f} tok/s" if speed else "", hint)))
