"""Operations that torch does not have, each with its own file."""
