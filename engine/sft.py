"""Conversations as training examples: token ids, and targets on the answers only."""

from __future__ import annotations

from collections.abc import Sequence

from .batches import IGNORE_INDEX
from .chat_templates import ChatTemplate
from .conversations import BadRow, Conversation, Message
from .errors import DataError


def encode_conversation(messages: Sequence[Message], template: ChatTemplate) -> tuple[list[int], list[int]]:
    """Token ids and aligned targets of a conversation.

    Returns:
        (input ids, targets) of equal length: targets[i] is the token behind input i where that token
        belongs to an answer or ends one, IGNORE_INDEX everywhere else.
    """
    ids, is_target = template.training_ids(messages)
    targets = [token if counts else IGNORE_INDEX for token, counts in zip(ids[1:], is_target[1:], strict=True)]
    return ids, [*targets, IGNORE_INDEX]


def encode_conversations(
    conversations: Sequence[Conversation], template: ChatTemplate, sequence_length: int
) -> tuple[list[tuple[list[int], list[int]]], list[BadRow]]:
    """Encode conversations that fit.

    Returns:
        (examples, too long): conversations longer than `sequence_length` tokens are listed, not cut, since
        a cut would take the answer's end.

    Raises:
        DataError: if none fits, or the template refuses one.
    """
    examples, too_long, shortest = [], [], None
    for conversation in conversations:
        ids, targets = encode_conversation(conversation.messages, template)
        if len(ids) <= sequence_length:
            examples.append((ids, targets))
        else:
            shortest = min(len(ids), shortest or len(ids))
            too_long.append(conversation.bad(f"{len(ids):,} tokens, more than sequence_length = {sequence_length:,}"))
    if not examples:
        raise DataError(
            f"every conversation is longer than sequence_length = {sequence_length} tokens "
            f"(the shortest has {shortest})"
        )
    return examples, too_long
