"""``python -m patchpilot``"""

from patchpilot.cli import main

if __name__ == "__main__":
    main()
