"""Rules for what a command step may receive, checked when a file is loaded and again when the command runs."""

from __future__ import annotations

VALUE_BYTES = 128 * 1024
"""The kernel's limit for one argument or one `NAME=value` of the environment, including the terminating zero byte."""

_REFUSED = frozenset({
    # search paths for programs, and the runner's own variables
    "PATH", "HOME", "TMPDIR", "PWD", "OLDPWD", "CDPATH",
    # what a shell executes, or uses to split words
    "IFS", "ENV", "BASH_ENV", "SHELLOPTS", "BASHOPTS", "PS4", "PROMPT_COMMAND", "GLOBIGNORE", "BASH_XTRACEFD",
    # what libraries and interpreters load or execute
    "GCONV_PATH", "LOCPATH", "NLSPATH", "PYTHONSTARTUP", "PYTHONHOME", "PYTHONINSPECT", "PYTHONWARNINGS", "PERL5OPT",
    "PERL5DB", "RUBYOPT", "NODE_OPTIONS", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS",
    "GIT_SSH", "GIT_SSH_COMMAND", "GIT_EXTERNAL_DIFF", "GIT_PROXY_COMMAND", "GIT_ASKPASS", "GIT_EDITOR", "GIT_PAGER",
    "GIT_CONFIG_COUNT", "GIT_CONFIG_PARAMETERS", "GIT_EXEC_PATH", "GIT_TEMPLATE_DIR", "LESSOPEN", "LESSCLOSE", "PAGER",
    "EDITOR", "VISUAL", "BROWSER",
})  # fmt: skip
_REFUSED_PREFIXES = ("LD_", "DYLD_", "BASH_FUNC_", "GLIBC_TUNABLES", "GIT_CONFIG_KEY_", "GIT_CONFIG_VALUE_")


def refused_variable(name: str) -> str | None:
    """Return why an environment variable of this name may not be set for a command, or None if it may."""
    if not name or "=" in name or "\0" in name:
        return f"{name!r} cannot be the name of an environment variable."
    if name in _REFUSED or name.startswith(_REFUSED_PREFIXES):
        return f"{name} may not be set for a command: it decides which program text runs."
    return None


def refused_value(what: str, value: str) -> str | None:
    """Return why a value cannot be passed to a command, or None if it can.

    `what` names it in the message: "argument 2", or the variable's name, which counts towards the limit as `NAME=`.
    """
    if "\0" in value:
        return f"{what} contains a zero byte, which no process can be given."
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return f"{what} is not valid text (it holds half of a surrogate pair)."
    if size + len(what.encode()) + 2 > VALUE_BYTES:
        return f"{what} is {size:,} bytes long; a process can be given at most 128 KB in one value."
    return None
