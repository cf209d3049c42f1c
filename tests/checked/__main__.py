"""``make checked``: take in the results under build/checked and write the page anew."""

from tests.checked.checks import SECTIONS
from tests.checked.page import PAGE, render
from tests.checked.results import collect

if __name__ == "__main__":
    names = {name for section in SECTIONS for check in section.checks for name in check.sources}
    PAGE.write_text(render(collect(names)))
    print(f"{PAGE.name} is up to date")
