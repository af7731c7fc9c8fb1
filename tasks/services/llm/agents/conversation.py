"""A conversation with history: streamed replies, tool calls, and a summary of turns that no longer fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from tasks.errors import LikenessError, ReplyInvalid
from tasks.redaction import clean_text
from tasks.services.llm.agents.tools import Tool, run_tool_calls
from tasks.services.llm.budget.ledger import LedgerRow
from tasks.services.llm.chat.body import ChatBody, Message, count_body_tokens, make_body
from tasks.services.llm.chat.completion import ChatCompletion
from tasks.services.llm.service import LlmService

CONTEXT_SHARE = 0.8  # of the context window; token counts are estimates
KEPT_TURNS = 4
MAX_ROUNDS = 6
SUMMARIZE = "Sum up this conversation in at most 120 words: what was decided, what was changed, what is open."


class History(BaseModel):
    """The conversation so far: a summary of old turns, and the recent ones verbatim."""

    summary: str = ""
    turns: list[list[Message]] = []
    """A turn begins with a user message and ends with the assistant's reply."""


@dataclass
class Conversation:
    """A multi-turn conversation with the first profile of a role."""

    llm: LlmService
    role: str
    system: str
    tools: Sequence[Tool] = ()
    history: History = field(default_factory=History)

    @property
    def name(self) -> str:
        """The profile that serves the role."""
        return self.llm.config.fallback_chain(self.role)[0]

    def say(self, text: str, *, on_text: Callable[[str], None]) -> str:
        """Return the reply to a user message, streamed to `on_text`; tools are called in between.

        The history grows only after the last reply, so an interrupted or failed turn is not recorded in part.

        Raises:
            ServiceUnavailable: the reply did not arrive completely.
            ReplyInvalid: it can't be read.
            BudgetExceeded: the next call could pass the cap.

        """
        turn: list[Message] = [{"role": "user", "content": text}]
        self.fit_context(turn)
        by_name = {tool.name: tool for tool in self.tools}
        for number in range(MAX_ROUNDS):
            body = self.body([*self.history.turns, turn])
            if self.tools and number < MAX_ROUNDS - 1:  # the last round offers no tools, so it has to end with text
                body["tools"] = [tool.describe() for tool in self.tools]
            completion = self._send(body, on_text)
            if not completion.tool_calls:
                turn.append({"role": "assistant", "content": completion.content or completion.refusal})
                break
            calls = [call.to_wire() for call in completion.tool_calls]
            turn.append({"role": "assistant", "content": completion.content, "tool_calls": calls})
            max_side = self.llm.config.profiles[self.name].max_image_side
            turn += run_tool_calls(completion.tool_calls, by_name, [], max_side=max_side)
        else:
            raise ReplyInvalid(f"the model calls tools in each of {MAX_ROUNDS} rounds and gives no reply; ask again")
        self.history.turns.append([without_images(message) for message in turn])
        return str(turn[-1].get("content") or "")

    def body(self, turns: Sequence[Sequence[Message]]) -> ChatBody:
        """Return a chat completion's body over the given turns."""
        profile = self.llm.config.profiles[self.name]
        summary = f"\n\nWhat was said before, in short: {self.history.summary}" if self.history.summary else ""
        system: Message = {"role": "system", "content": self.system + summary}
        return make_body(profile, [system, *(message for turn in turns for message in turn)])

    def _send(self, body: ChatBody, on_text: Callable[[str], None]) -> ChatCompletion:
        profile = self.llm.config.profiles[self.name]
        row = LedgerRow(self.role, self.name, profile.model, outcome="")
        is_streaming = profile.capabilities.streaming
        completion = self.llm.send(body, row=row, on_text=on_text if is_streaming else None)
        self.llm.record_completion(completion, row=row)
        if completion.problem:
            raise ReplyInvalid(f"the reply has an unexpected shape: {completion.problem}; ask again")
        if not is_streaming and completion.content:
            on_text(clean_text(completion.content))
        return completion

    def fit_context(self, turn: list[Message]) -> None:
        """Summarize or drop old turns until the next request fits the model's context."""
        while self.history.turns and not self.fits(turn):
            # All but the newest KEPT_TURNS in one summary; then, if these don't fit either, one turn at a time.
            num = max(1, len(self.history.turns) - KEPT_TURNS)
            old, self.history.turns = self.history.turns[:num], self.history.turns[num:]
            # Without a new summary the turns are dropped all the same: the conversation has to fit.
            self.history.summary = self.summarize(old) or self.history.summary

    def fits(self, turn: list[Message]) -> bool:
        """Whether a request with all turns leaves room for the reply."""
        profile = self.llm.config.profiles[self.name]
        body = self.body([*self.history.turns, turn])
        body["tools"] = [tool.describe() for tool in self.tools]
        used = sum(count_body_tokens(body, profile))
        return used <= CONTEXT_SHARE * profile.capabilities.context_tokens

    def summarize(self, turns: list[list[Message]]) -> str:
        """Return a summary of turns to be dropped; an empty string where the call fails."""
        lines = [f"{message['role']}: {message['content']}" for turn in turns for message in turn if message["content"]]
        words = f"Before that: {self.history.summary}\n" if self.history.summary else ""
        ask: Message = {"role": "user", "content": f"{words}{chr(10).join(lines)}\n\n{SUMMARIZE}"}
        row = LedgerRow(self.role, self.name, self.llm.config.profiles[self.name].model, outcome="", reason="summary")
        body = make_body(self.llm.config.profiles[self.name], [{"role": "system", "content": self.system}, ask])
        try:
            completion = self.llm.call(body, row=row)
        except LikenessError:
            return ""
        return completion.content or ""


def without_images(message: Message) -> Message:
    """Return a message for the history, with images as placeholders: each would be sent again with every turn."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part["text"] if part["type"] == "text" else "(a picture)" for part in content]
    return {**message, "content": " ".join(texts)}
