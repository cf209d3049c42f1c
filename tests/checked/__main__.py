"""``make checked``: take in the results under build/checked and write the page anew."""

from tests.checked.page import PAGE, render
from tests.checked.results import collect

if __name__ == "__main__":
    PAGE.write_text(render(collect()))
    print(f"{PAGE.name} is up to date")
