"""What `--help` says: of the program, and of each command. No imports, so that it answers at once."""

USAGE = """\
qbench: run quantization papers, and set the published numbers beside your own.

  qbench method=pact bits=4                       one run: float parent, calibrate, train, evaluate, draw
  qbench -m method=pact,lsq bits=2,3,4 seed=0,1   a sweep: every combination, one table at the end
  qbench list                                     methods, models, data sets, budgets
  qbench table [DIR] [format=csv]                 the table of the results below DIR (outputs)
  qbench eval RUN|FILE|CHECKPOINT [option=value]  evaluate again
  qbench export RUN [out=FILE]                    one file of packed codes, tables and floats, without the run's folder
  qbench inspect FILE                             what is in a packed file: layers, bits, bytes; its checksums compared
  qbench sensitivity RUN [bits=2,4] [size=3]      each layer alone at low bits; bits for each layer within a budget
  qbench compare RUN RUN                          what differs in configuration and outcome
  qbench paper list                               tables and figures of papers that can be redrawn
  qbench paper CARD|all [budget=short] [seeds=3]  run one or all, beside what was published
  qbench bench [check|page] [only=step/pact]      how fast it is here, as ratios
  qbench COMMAND --help                           more about list, table, eval, export, sensitivity, paper, bench ...
  qbench method=flexor --help                     a method's bits and options

Options, as name=value (conf/config.yaml holds all of them):
  method= model= dataset= budget=       from the lists; budget: smoke, demo (default), short, paper
  bits=4  bits=4/8  w_bits=  a_bits=    weights and activations, weights/activations, one of them
  options.NAME=                         what the method offers beyond bits, e.g. options.n_tap=2 for flexor
  train.NAME=  parent.NAME=             epochs, lr, batch_size, optimizer, schedule ... of training / float parent
  init=scratch|float|CHECKPOINT         what the run starts from
  distill.weight=0.5  distill.teacher=  a loss from a teacher beside the labels': the float parent, a run, a checkpoint
  dataset.root=DIR                      where the data lie
  seed=  precision=fp32|tf32|bf16|auto  device=auto|cpu|cuda  graph=auto  workers=  threads=  out=DIR
  plan=true                             print configuration, manifest and time, and run nothing
  time_limit=90s|8m|1.5h|2d             save the state and end before so long (a whole sweep too), with exit status 124
  force=true                            compute a finished run anew; what was there is kept beside it as FOLDER.old-1
  figures=png|svg|pdf                   format of a run's pictures; those of a finished run are drawn from its files
  debug=true                            show tracebacks
  hydra/launcher=joblib                 (with -m) runs side by side, one thread each
  hydra/sweeper=optuna                  (with -m, hydra.sweeper.direction=maximize) a search by test accuracy, where
                                        hydra-optuna-sweeper is installed; a run that failed counts as 0 %

Paths and names (out, init, name, dataset.root) are taken as typed: spaces, =, (, # and letters of any kind. A ~ in
front is your home folder; in a sweep a comma parts values unless it stands in quotes.

The same command again goes on where it was cut off, or says what came out. Exit status: 0 done; 1 a run failed; 2 the
command is wrong; 124 out of time; 130 stopped by Ctrl-C or SIGTERM (124 and 130: everything is saved).
"""

# By command.
HELP = {
    "list": """\
qbench list [format=md]         methods (with the bits they take), models, data sets and budgets, one a line;
                                format=md: the methods as the README has them
""",
    "table": """\
qbench table [DIR] [format=text]        one row for each setting of the results below DIR (outputs), seeds as mean ± std

  format=text|csv|md|latex|json   json has the accuracies seed by seed
  A column `varies` says in what rows differ that look alike. Copies of one run count once.
""",
    "eval": """\
qbench eval RUN [dataset.NAME=value ...]        the net of a finished run, on its test set
qbench eval FILE [dataset.NAME=value ...]       the same of a packed file (qbench export), its weights from the codes
qbench eval CHECKPOINT [option=value ...]       a plain float state_dict; the options say which net and data

  dataset.root=DIR      where the data lie; of a run's options only those of the data set and the device may be set
  device=cpu            auto, cpu or cuda; as the run was trained by default
  allow=PACKAGE         a run's folder builds classes of qbench, torch.nn, torch.optim and torchvision.models, else
                        nothing: whoever wrote it could run any code here. PACKAGE (or [A,B]) may be used too
  model=  dataset=      of a plain checkpoint (resnet20, digits)
""",
    "export": """\
qbench export RUN [out=FILE]    the trained net of a finished run as one packed file (RUN/packed.safetensors)

  format=packed         the only one so far: a safetensors container, described in docs/format.md
  allow=PACKAGE         as in eval

It holds the codes of each quantized weight in their bits, scales and tables, biases, batch-norm, layers in float, and
what builds the net again; no pickle. qbench.load(FILE) gives the net, bit for bit; qbench eval FILE evaluates it. A net
whose codes do not give its weights back, bit for bit, is refused.
""",
    "inspect": """\
qbench inspect FILE     what is in a packed file: each layer with its bits, bytes, multiplications and bit operations,
                        then sizes. All checksums are compared; what is cut off, altered or of a later version of the
                        format is refused, with the part that it is
""",
    "sensitivity": """\
qbench sensitivity RUN [bits=2,4,8] [size=4]    what each layer alone loses at so many bits, all else in float

  method=ptq  options.NAME=     how the layer is quantized; calibrated only, whatever the method
  sites=both                    its weights and its input; weights or activations: one of them
  images=1024                   training images on which losses are taken: the test set chooses nothing
  size=BITS                     choose bits for each layer, so that weights have so many on average ...
  bops=BITS*BITS                ... or multiplications (16: as many bit operations as 4/4); written for layer_bits=FILE
  device=  threads=  kernels=  out=  dataset.root=  allow=  debug=    as in a run, and as in eval

Leaves a table, its JSON and a picture in OUT/sensitivity-.... What several layers lose is taken to add up.
""",
    "compare": """\
qbench compare RUN RUN          what differs between two finished runs, leaf by leaf: first what was asked for, then
                                what came out, then where and by what it was computed
""",
    "paper": """\
qbench paper list                               tables and figures of papers that can be redrawn
qbench paper CARD ... [option=value ...]        run what is missing of them, and draw it beside what was published
qbench paper all [option=value ...]             the same for every card

  budget=short            how long each run trains: smoke (a trial of two rows), demo, short, paper
  seeds=3  seeds=0,4      how many (0, 1, 2), or which; one by default
  only=PATTERN,...        rows of a card, e.g. only='resnet20*'
  plan=true               say what would be run, and run nothing
  draw=true               collect what is finished and draw it, run nothing
  out=DIR                 where runs go and are looked for (outputs)
  results=DIR             where tables and figures go (docs/results of a checkout, else results)
  time_limit=8m           for all of it: the run in hand saves its state, and the same command goes on
  allow=PACKAGE           that the words of a card may name, as of a run in qbench eval
  device=  threads=  dataset.root=  tensorboard=  checkpoint_seconds=  debug=    as in a run
""",
    "bench": """\
qbench bench                          all of it, about eight minutes on two cores
qbench bench check                    a short run against docs/benchmarks.json; fails when a ratio got worse
qbench bench page                     docs/benchmarks.md from docs/benchmarks.json

  only=step/pact,data/*   what to measure           model=resnet20,...      nets (default resnet20)
  rounds=5  batch=128     repetitions, images       precision=fp32,bf16
  threads=                CPU threads (all cores)   kernels=auto            cpp, compile, torch: or several
  only=busy               a step beside other programs, by how its threads wait (OMP_WAIT_POLICY, GOMP_SPINCOUNT)
  peers=true              Brevitas, torch.ao and torchao beside ours, where they are installed
  device=cuda             what is measured on a GPU: steps as CUDA graphs and op by op, data, runs side by side
  quick=true              seconds, on a tiny net    out=DIR                 write DIR/bench.json (entries that it
  against=FILE margin=0.25   of check                                       holds are kept unless measured now)
""",
}
