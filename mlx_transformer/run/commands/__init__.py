"""The commands of `python -m mlx_transformer`, and how a command line finds its command."""

import pkgutil
import sys
from collections.abc import Mapping

from mlx_transformer.utils.errors import BadInput

Commands = Mapping[str, tuple[str, str]]  # name -> (module:function, one line for --help)


def dispatch(commands: Commands, prog: str, args: list[str] | None = None) -> None:
    """Call the command that the first argument names as function(prog, args); only its module is imported.

    --help prints the commands. args: default, the command line's. Raises BadInput for an unknown or missing command.
    """
    name, *rest = (sys.argv[1:] if args is None else args) or [""]
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        print(f"usage: {prog} COMMAND ...; {prog} COMMAND --help lists its flags\n")
        print("\n".join(f"    {command:<{width}}  {line}" for command, (_, line) in commands.items()))
        return
    if name not in commands:
        problem = f"command {name!r} is unknown" if name else "a command is missing"
        raise BadInput(f"{problem}: expected {', '.join(commands)}; see {prog} --help")
    pkgutil.resolve_name(commands[name][0])(f"{prog} {name}", rest)
