"""`glimt chat`: a conversation at the keyboard, or one question per line of a pipe.

Answers go to stdout and everything else to stderr, so that a pipe gets the answers alone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any

from glimt.commands.chat_commands import COMMANDS, ChatState, as_command, run_command
from glimt.commands.chat_input import Entry, Reader
from glimt.commands.console import note, say_error, warn, write_answer
from glimt.commands.conversation import Conversation, Turn, default_question
from glimt.commands.memory import note_plan
from glimt.commands.pictures import read_picture
from glimt.commands.running import check_language, facts, load_engine, run_request
from glimt.config import EngineConfig
from glimt.engine import Engine
from glimt.errors import EngineError, ImageError, PromptTooLong, RequestError
from glimt.inputs.request import RequestOptions
from glimt.types import FinishReason, SamplingParams, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatJob:
    """What the command line asked for.

    engine:   fields of EngineConfig
    sampling: fields of SamplingParams
    """

    engine: Mapping[str, Any]
    sampling: Mapping[str, Any]
    images: Sequence[str] = ()
    system: str | None = None
    language: str = "auto"
    is_verbose: bool = False


def chat(job: ChatJob) -> None:
    """Load the model and talk until the user leaves. Raises GlimtError before that only."""
    config = EngineConfig(**job.engine, max_num_seqs=1)
    sampling = SamplingParams(**job.sampling)
    check_language(job.language)
    pictures = [read_picture(given, config.image_limits) for given in job.images]
    conversation = Conversation(job.system, waiting=pictures)
    engine = load_engine(config)
    if job.is_verbose:
        note_plan(engine)
    defaults = engine.opened.processor.sampling_defaults
    state = ChatState(conversation, sampling, defaults, engine.stats, config.image_limits)
    Chat(engine, state, Reader(tuple(COMMANDS)), job.language).run()


class Chat:
    """The loop: read, answer, remember."""

    def __init__(self, engine: Engine, state: ChatState, reader: Reader, language: str) -> None:
        self.engine = engine
        self.state = state
        self.reader = reader
        self.language = language
        self._has_told_training = False

    def run(self) -> None:
        """Go on until the end of input, Ctrl-C at the prompt, or /quit."""
        if self.reader.is_interactive:
            self._greet()
        while not self.state.is_over and (entry := self.reader.read()) is not None:
            self._take(entry)

    def _greet(self) -> None:
        opened = self.engine.opened
        dtype = str(opened.dtype).removeprefix("torch.")
        context = self.engine.inputs.limits.max_model_len
        note(f"{opened.family.name}, {dtype} on {opened.device.name}, {context} tokens of context")
        note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        for picture in self.state.conversation.waiting:
            note(f"picture for the first question: {picture}")
        if self.state.conversation.waiting:
            note(f"an empty line asks: {default_question(self.language, os.environ)}")

    def _take(self, entry: Entry) -> None:
        command = None if entry.is_quoted else as_command(entry.text)
        try:
            if command is None:
                self._ask(entry.text)
            elif said := run_command(self.state, *command):
                note(said)
        except RequestError as error:
            say_error(error)
            self._advise(error)

    def _advise(self, error: RequestError) -> None:
        waiting = self.state.conversation.waiting
        if isinstance(error, PromptTooLong):
            note("/clear starts a new conversation; /set max_tokens N asks for less")
        if waiting:
            names = ", ".join(picture.given for picture in waiting)
            note(f"still waiting for the next question: {names}; /image none drops them")

    # --- one question ---

    def _ask(self, text: str) -> None:
        """Answer and remember. Raises RequestError, with the conversation as it was."""
        conversation = self.state.conversation
        if not text.strip():
            if not conversation.waiting:
                return
            text = default_question(self.language, os.environ)
            note(text)
        self._tell_training()
        turn = conversation.ask(text)
        try:
            answered = self._answer(turn)
        except ImageError:
            conversation.waiting.clear()  # or every later question would fail as this one did
            raise
        if answered is not None:
            conversation.add(answered)

    def _tell_training(self) -> None:
        if self.state.conversation.is_beyond_training and not self._has_told_training:
            self._has_told_training = True
            warn(
                "note: the model was trained on one picture, shown with the first question; "
                "with several, or with a later one, its answers are less reliable"
            )

    def _answer(self, turn: Turn) -> Turn | None:
        """Stream the answer; the turn with it, or None if there is nothing to remember."""
        messages = self.state.conversation.messages(turn)
        options = RequestOptions(language=self.language)
        request = self.engine.prepare_chat(messages, self.state.sampling, options)
        pieces: list[str] = []
        with InterruptFlag() as flag:
            for output in run_request(self.engine, request, flag.is_set):
                flag.said = b""
                pieces.append(output.text)
                write_answer(output.text)
                last = output
        write_answer("\n")
        return self._finished(replace(turn, answer="".join(pieces)), last)

    def _finished(self, turn: Turn, last: StepOutput) -> Turn | None:
        """Say how the answer ended, and whether it is worth remembering."""
        if last.finish_reason == "error":
            say_error(EngineError(last.error or "the answer ended with an error"))
            note("the question is not remembered")
            return None
        assert last.usage is not None, "a finished output carries its counts"
        assert last.timings is not None, "and its times"
        note(facts(last.usage, last.timings) + _ENDINGS.get(last.finish_reason or "stop", ""))
        if last.finish_reason == "abort" and not turn.answer:
            note("stopped before the first word; the question is not remembered")
            return None
        return replace(turn, is_partial=last.finish_reason == "abort")


_ENDINGS: Mapping[FinishReason, str] = {"abort": " · stopped", "length": " · cut at the limit"}


class InterruptFlag:
    """While it is entered, Ctrl-C only raises a flag; a second one interrupts as usual.

    An exception in the midst of a step would leave the engine half done, so the step is ended.
    said: written to a terminal at the first Ctrl-C, because the first step of a large model can
        go on for a minute
    """

    def __init__(self) -> None:
        self.said = b" stopping after this step; Ctrl-C again leaves at once\n"
        self._is_set = False
        self._previous: Any = None

    def is_set(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._is_set

    def __enter__(self) -> InterruptFlag:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_set:
            raise KeyboardInterrupt
        self._is_set = True
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), self.said)  # print is not safe inside a handler
