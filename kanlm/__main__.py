from kanlm.cli import main

main()
