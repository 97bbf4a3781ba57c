"""python -m training.to_hf SRC DST: `cnq to-hf`, where the other steps of training are."""

from cnq.cli import to_hf_command

if __name__ == "__main__":
    to_hf_command.main(prog_name="python -m training.to_hf")
