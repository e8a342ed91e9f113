"""Every error Deltaworks raises, named by what the caller can do about it.

| class            | the caller                                                   |
|------------------|--------------------------------------------------------------|
| `RetryableError` | may make the same call again, later                          |
| `TerminalError`  | must get a person: configuration, permission, bad input      |
| `InvariantError` | must stop: our bug or lying data; never skip, never continue |

A stage names its own faults as subclasses beside the code that raises them. Messages say what
could not be done, the value, and the next step; they never hold row data or secrets.
"""


class DeltaworksError(Exception):
    """The root of every error that Deltaworks raises on purpose."""


class RetryableError(DeltaworksError):
    """The same call may work later; nothing was lost."""


class TerminalError(DeltaworksError):
    """Trying again cannot help; the message names what a person has to change."""


class InvariantError(DeltaworksError):
    """A promise was broken by our code or by the data: work stops where it is, positions are kept."""
