def draw(run):
    return []


def run_plot(config):
    pass
