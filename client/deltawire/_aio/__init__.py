"""The asynchronous client: the blocking one with `await` in it."""

from deltawire._aio.chat import AsyncChat, AsyncChatStream
from deltawire._aio.client import AsyncClient
from deltawire._aio.models import AsyncModelList, AsyncModels, AsyncModelWatch, AsyncProviders

__all__ = [
    "AsyncChat",
    "AsyncChatStream",
    "AsyncClient",
    "AsyncModelList",
    "AsyncModelWatch",
    "AsyncModels",
    "AsyncProviders",
]
