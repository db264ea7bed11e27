"""Sessions: a text that grows, and whose pages stay cached."""

from typing import TYPE_CHECKING, Any

from paged_jax.engine.intake import Prompt
from paged_jax.engine.request import Completion
from paged_jax.sampling import BeamParams, SamplingParams

if TYPE_CHECKING:
    from paged_jax.engine.engine import Engine


class Session:
    """A conversation, or a node of a search: the pages of what was said stay cached until it is closed.

    All sessions of an engine together keep at most `max_kept_pages`. Where nothing could run otherwise, even kept pages
    are given up, and computed again when they are needed: a session may be slow then, but its tokens are the same.

    Args:
        engine: the engine that computes it; made by `Engine.session`.
        tokens: the tokens that it begins with.
        salt: of its requests, see `Engine.add_request`.
        adapter: of its requests, see `Engine.add_request`.

    Examples:
        >>> with engine.session("def main(") as node:
        ...     best, other = node.generate(SamplingParams(max_new_tokens=8, temperature=1.0, num_samples=2))
        ...     children = [node.fork(best), node.fork(other)]  # which share all pages of the node
        >>> len(children[0].tokens) - len(node.tokens)
        8
    """

    def __init__(self, engine: "Engine | Any", tokens: tuple[int, ...] = (), salt: str = "", adapter: str = ""):
        self._engine = engine
        self.tokens, self.salt, self.adapter = tokens, salt, adapter
        self.is_closed = False
        engine.remember(self)

    def append(self, what: Prompt | Completion) -> None:
        """Add to what was said: a text, token ids, or a completion.

        Raises:
            ValueError: it is none of these, or the session is closed.
        """
        self._check_open()
        self.tokens += self._engine.tokens_of(what, is_first=not self.tokens)
        self._engine.remember(self)

    def generate(
        self,
        params: SamplingParams | BeamParams = SamplingParams(),  # noqa: B008  frozen
        **options: Any,
    ) -> list[Completion]:
        """Continuations of what was said. The session stays as it is until you append one of them.

        Args:
            params: how it is continued.
            options: the other arguments of `Engine.add_request`.

        Raises:
            ValueError: as `Engine.add_request`, or the session is closed.
        """
        self._check_open()
        options = {"salt": self.salt, "adapter": self.adapter} | options
        completions = self._engine.generate([self.tokens], params, **options)[0]
        self._engine.remember(self)
        return completions

    def fork(self, *more: Prompt | Completion) -> "Session":
        """Another session that says the same, and then more. It shares all pages of this one.

        Raises:
            ValueError: as `append`.
        """
        self._check_open()
        child = Session(self._engine, self.tokens, self.salt, self.adapter)
        for what in more:
            child.append(what)
        return child

    def close(self) -> None:
        """Let the pages be evicted like all others. Closing a session again does nothing."""
        self.is_closed = True
        self._engine.remember(self)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        return f"Session: {len(self.tokens)} tokens, {state}"

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.is_closed:
            raise ValueError("this session is closed: fork it before, or begin another one")
