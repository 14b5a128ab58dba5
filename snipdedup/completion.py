"""``snip completion``: what makes a shell complete commands, flags and values, from `config`.

fire can print such a script too, but knows the functions that it is given, not these commands.
"""

from __future__ import annotations

import shlex

from snipdedup.config import COMMANDS, Completion

BASH = """\
_snip() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"; fi
  case "${{COMP_WORDS[1]}}" in
{flags}
  esac
  case "${{COMP_WORDS[1]}} $before" in
{values}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _snip snip
"""


def run(options: Completion) -> str:
    """Run ``snip completion``; return the script for a shell."""
    if options.shell == "fish":
        return fish()
    load = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"
    return (load if options.shell == "zsh" else "") + bash()


def bash() -> str:
    """Return the script for bash; zsh can run it, too."""
    flags, values = [], []
    for command in COMMANDS.values():
        names = " ".join(f"--{field.name}" for field in command.fields(positional=False))
        flags.append(f'    {command.name}) [[ $word == -* ]] && words="{names}" ;;')
        for field in (f for places in (True, False) for f in command.fields(positional=places)):
            if field.metadata.get("choices"):
                before = command.name if field.metadata.get("positional") else f"--{field.name}"
                choices = " ".join(field.metadata["choices"])
                values.append(f'    "{command.name} {before}") words="{choices}" ;;')
    parts = {"flags": "\n".join(flags), "values": "\n".join(values)}
    return BASH.format(commands=" ".join(COMMANDS), **parts)


def fish() -> str:
    """Return the script for fish, with the meaning of each word."""
    lines = []
    for command in COMMANDS.values():
        does = shlex.quote(command.does)
        lines.append(f"complete -c snip -n __fish_use_subcommand -xa {command.name} -d {does}")
        within = f"complete -c snip -n '__fish_seen_subcommand_from {command.name}'"
        for field in command.fields(positional=False):
            takes = "" if isinstance(field.default, bool) else " -r"
            choices = field.metadata.get("choices")
            takes = f" -xa '{' '.join(choices)}'" if choices else takes
            meaning = shlex.quote(field.metadata["help"])
            lines.append(f"{within} -l {field.name}{takes} -d {meaning}")
        for field in command.fields(positional=True):
            if choices := field.metadata.get("choices"):
                lines.append(f"{within} -xa '{' '.join(choices)}'")
    return "\n".join(lines)
