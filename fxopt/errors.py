"""Every error that fxopt raises: one class per mistake, each message says what, where and what to do."""

from __future__ import annotations


class FxoptError(Exception):
    """Base of all errors raised by fxopt."""


class UnsupportedTorchError(FxoptError, RuntimeError):
    """The installed torch is older than the oldest supported release."""


class OptionError(FxoptError, ValueError):
    """An option, lowering or mode name that fxopt does not know, or a value of the wrong kind."""


class UnknownPassError(FxoptError, KeyError):
    """A pass name that is not registered; the message lists the registered ones."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CaptureError(FxoptError, RuntimeError):
    """The model could not be captured as a graph; the message carries the user's line."""


class CallError(FxoptError, ValueError):
    """A rewritten module was called with arguments that its program does not serve; names the argument."""


class PreparationError(FxoptError, ValueError):
    """Nothing of a model can be prepared for training, or a module that was not prepared is to be converted."""


class MaskError(FxoptError, ValueError):
    """A mask that does not say which tokens count; says what it is and what would do."""


class ExpressionError(FxoptError, ValueError):
    """Text or operands that are not part of the expression language."""


class VerificationError(FxoptError, RuntimeError):
    """A rewritten program broke an invariant or left its error budget; names the pass, the rule and the node."""


class PassError(FxoptError, RuntimeError):
    """A pass raised or was rolled back under ``strict=True``; names the pass and the user's line."""


class LoweringError(FxoptError, RuntimeError):
    """A lowering was asked for explicitly and cannot serve the site; says why and which can."""


class CacheError(FxoptError, RuntimeError):
    """The cache directory cannot be used safely (owner, mode, link or damaged entry)."""


class ReportError(FxoptError, ValueError):
    """Text that is not a report, or one that another version of fxopt wrote."""


class DumpError(FxoptError, OSError):
    """A dump can't be written to the place asked for; names the place, what stands in the way and what to do."""


class TargetError(FxoptError, ValueError):
    """A command-line target that can't be loaded, or that gives something other than a model with its inputs."""


class TargetRunError(FxoptError, RuntimeError):
    """The code of a command-line target raised: while it was imported, or when its factory or model was called."""


class FxoptWarning(UserWarning):
    """Something was asked for and not done, or a fallback was taken; said once per place."""
