def main(stage):
    raise NotImplementedError
