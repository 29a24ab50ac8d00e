"""Compacter's product x·H with ``H = Σᵢ Aᵢ ⊗ (sᵢ·tᵢ)``: is it cheaper to build H, or to multiply by the factors?

python bench/compacter_product.py [--json OUT]
"""

import argparse

import torch
from timing import interleaved, machine, ratios, table, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.manual_seed(0)
    n, rows = 4, {}
    for tokens, hidden, width in ((16, 384, 12), (512, 384, 12), (4096, 384, 12), (512, 768, 24)):
        x, rule = torch.randn(tokens, hidden), torch.randn(n, n, n)
        left, right = torch.randn(n, hidden // n, 1), torch.randn(n, 1, width // n)

        def built(x=x, rule=rule, left=left, right=right):
            weight = torch.bmm(left, right)
            blocks = (rule.flatten(1).T @ weight.flatten(1)).reshape(n, n, *weight.shape[1:])
            return torch.nn.functional.linear(x, blocks.permute(1, 3, 0, 2).flatten(2, 3).flatten(0, 1))

        def factors(x=x, rule=rule, left=left, right=right):
            inner = torch.einsum("tac,kcr->tkar", x.unflatten(-1, (n, -1)), left)
            mixed = torch.einsum("kab,tkar->tkbr", rule, inner)
            return torch.einsum("tkbr,krd->tbd", mixed, right).flatten(1)

        torch.testing.assert_close(built(), factors(), rtol=1e-3, atol=1e-3)
        measured = ratios(interleaved({"built": built, "factors": factors}, options.rounds), "built")
        rows[f"{tokens} tokens, {hidden} to {width}"] = {
            "built ms": measured["built"]["ms"],
            "factors ms": measured["factors"]["ms"],
            "factors / built": measured["factors"]["ratio"],
        }
    table(f"forward of one product ({machine()['processor']}, {torch.get_num_threads()} threads)", rows)
    write(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
