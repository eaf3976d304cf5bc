#!/usr/bin/env python3
"""Stream an answer to the terminal, blocking.

    python chat.py MODEL "Why is the sky blue?"

The gateway is taken from $DELTAWIRE_TARGET, by default 127.0.0.1:50051.
"""

import os
import sys

from deltawire import CallError, Client, StopReason, StreamInterrupted


def main() -> int:
    """Send a prompt, print the answer, and print its usage."""
    if len(sys.argv) != 3:
        print("usage: python chat.py MODEL PROMPT", file=sys.stderr)
        return 2
    model, prompt = sys.argv[1:]
    target = os.environ.get("DELTAWIRE_TARGET", "127.0.0.1:50051")
    try:
        with Client(target) as client, client.chat.stream(prompt, model=model, timeout=120) as stream:
            for piece in stream.text:
                print(piece, end="", flush=True)
            print()
            answer = stream.final()
    except StreamInterrupted as error:
        print(f"\nthe stream broke off; send the prompt again ({error.message})", file=sys.stderr)
        return 1
    except CallError as error:
        print(f"\n{error.reason or error.code.name}: {error.message} (request {error.request_id})", file=sys.stderr)
        return 1
    print(f"{StopReason.Name(answer.stop_reason)}, {answer.usage.completion_tokens} tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
