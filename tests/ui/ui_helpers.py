"""What the page's tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from qwen_fast.ui.config import HistoryLimits
from qwen_fast.ui.history import new_token, owner_of

LIMITS = HistoryLimits(
    conversations=5, messages=8, message_bytes=4096, conversation_bytes=16384, title_chars=40, file_bytes=2**20
)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def new_owner() -> str:
    return owner_of(new_token())
