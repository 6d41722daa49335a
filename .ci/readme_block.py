"""Prints the shell commands that follow `<!-- ci: NAME -->` in the README.

Usage: python3 .ci/readme_block.py NAME < README.md
"""

import re
import sys


def main() -> None:
    name = sys.argv[1]
    marked = re.compile(
        rf"^<!-- ci: {re.escape(name)} -->\s*^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL
    )
    blocks = marked.findall(sys.stdin.read())
    if len(blocks) != 1:
        sys.exit(f"the README must have one bash block marked 'ci: {name}', it has {len(blocks)}")
    print(blocks[0], end="")


main()
