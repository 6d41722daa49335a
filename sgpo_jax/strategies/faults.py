"""Faults of a request: their kinds, and what is done about each.

docs/strategies.md has the rules of this module as a table. Codes and words are those of several servers.
"""

import re


class Failed(Exception):
    """A request has no reply."""

    lost = (0, 0)  # (prompt tokens, completion tokens) that the server charged all the same


class Denied(Failed):
    """No request can succeed: the key, the balance, the permission, the address or the model's name is wrong."""


class Refused(Failed):
    """The server rejects this request, or it is too long for a local model."""


class TooLong(Refused):
    """The prompt does not fit into the model's context."""


class Filtered(Refused):
    """The server's filter stopped the prompt or the text."""


class Unavailable(Failed):
    """The retries are used up, or the caller stopped waiting."""


class Fault(ValueError):
    """A response without a reply.

    Args:
      title: the kind of fault in a few words, by which faults are counted.
      words: what the server says, or how its body begins.
      status: the HTTP status, or the status inside the body; 0 if there is none.
      codes: the error's codes and types, in lower case.
      parameter: the parameter that the error is about, or "".
      tokens: (prompt tokens, completion tokens) that the server charged all the same.
      told: whether the words are an error's; otherwise they decide nothing.
    """

    wait = 0.0  # seconds that the server asks to wait

    def __init__(
        self,
        title: str,
        words: str,
        *,
        status: int = 0,
        codes: frozenset[str] = frozenset(),
        parameter: str = "",
        tokens: tuple[int, int] = (0, 0),
        told: bool = True,
    ):
        super().__init__(f"{title}: {words}" if words else title)
        self.words, self.status, self.codes, self.parameter = words if told else "", status, codes, parameter
        self.tokens = tokens

    def kind(self) -> type[Failed] | None:
        """Returns the exception of a fault that no retry mends; None for a fault that may pass."""
        if self.codes & _FILTER_CODES or (self.status in _BY_WORDS and _FILTER_WORDS.search(self.words)):
            return Filtered
        if self.codes & _DENIED_CODES or self.status in _DENIED_STATUSES or _DENIED_WORDS.search(self.words):
            return Denied
        if self.codes & _LONG_CODES or (self.status != 429 and _LONG_WORDS.search(self.words)):
            return TooLong
        if self.status in _PASSING or (self.status >= 500 and self.status not in (501, 505)):
            return None
        return Refused if self.status or self.codes & {"invalid_request_error", "badrequesterror"} else None


class Unreadable(Fault):
    """A body that is no JSON object."""


_PASSING = (408, 409, 425, 429)
_BY_WORDS = (0, 400, 403, 422, 451)  # statuses of servers whose filter is known by the words alone; 0 is a 200
_DENIED_STATUSES = (*range(300, 400), 401, 402, 403, 404, 405, 407, 410)
_FILTER_CODES = {
    "content_filter", "content_filtered", "content_policy_violation", "responsibleaipolicyviolation",
    "data_inspection_failed", "datainspectionfailed", "moderation_blocked", "content_moderation", "blocked_by_filter",
}  # fmt: skip
_FILTER_WORDS = re.compile(
    r"content (?:management )?(?:filter|polic)|content[ _]filter|responsible ai|inappropriate content|safety system"
    r"|(?:input|prompt|request|response|output|content) was (?:flagged|filtered|blocked by)|content exists risk",
    re.IGNORECASE,
)
_DENIED_CODES = {
    "insufficient_quota", "insufficient_balance", "insufficient_credits", "billing_hard_limit_reached",
    "billing_not_active", "invalid_api_key", "authentication_error", "permission_error", "permission_denied",
    "model_not_found", "notfounderror", "not_found_error", "account_deactivated", "unauthorized",
}  # fmt: skip
_DENIED_WORDS = re.compile(
    r"insufficient (?:account )?(?:credit|balance|fund|quota)|(?:invalid|incorrect|wrong|no) api[ _-]?key",
    re.IGNORECASE,
)
_LONG_CODES = {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
_LONG_WORDS = re.compile(
    r"maximum context length|exceeds? (?:the |this )?(?:model'?s? )?(?:available |maximum )?context (?:length|window"
    r"|size)|(?:prompt|input) is too long",
    re.IGNORECASE,
)


_UNSUPPORTED = re.compile(
    r"unsupported|not support|only the default|cannot (?:both )?be|can ?not both|not (?:allowed|permitted|available)"
    r"|unknown|unrecogni[sz]ed|unexpected|deprecated|extra (?:inputs|fields)|only one|may only be|must be 1\b"
    r"|only [\w.()' ]{1,20} (?:is|are) allowed",
    re.IGNORECASE,
)
_RANGE = re.compile(r"between|range|less than|greater than|at most|at least|[<>]=?|maximum|minimum", re.IGNORECASE)


def refused_parameter(fault: Fault, sent: list[str]) -> str:
    """Returns which of the parameters that were sent a fault refuses as such, or "".

    A fault that refuses a value because of its range is another matter: the value is the user's mistake.

    Args:
      fault: the fault.
      sent: names of the parameters; of two that the fault names, the first is returned.
    """
    by_code = any("unsupported" in code for code in fault.codes)
    if fault.status not in (0, 400, 422) or _RANGE.search(fault.words):
        return ""
    if not (by_code or _UNSUPPORTED.search(fault.words)):
        return ""
    if fault.parameter in sent:
        return fault.parameter
    quoted = {name for name in sent if re.search(rf"['\"`]{re.escape(name)}['\"`]", fault.words)}
    named = {name for name in sent if len(name) > 1 and re.search(rf"\b{re.escape(name)}\b", fault.words)}
    return next((name for name in sent if name in quoted | named), "")
