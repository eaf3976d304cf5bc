"""The blocking client: the client itself, and what it leads to."""

from deltawire._client.chat import Chat, ChatStream
from deltawire._client.client import Client
from deltawire._client.models import ModelList, Models, ModelWatch, Providers

__all__ = ["Chat", "ChatStream", "Client", "ModelList", "ModelWatch", "Models", "Providers"]
