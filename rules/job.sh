# What the shell commands of the rules call.

# Who asks all processes of a job to end asks this shell, too: it waits for the job, which may have to save itself.
trap : INT TERM

# logged FILE: to the terminal and to the file. It outlives an interrupt, so that the job can report how it saved.
logged() { (trap "" INT TERM; exec tee "$1"); }

# share THREADS PROCESSES: what each of the processes may have of a job's threads.
share() { echo $(( $1 > $2 ? $1 / $2 : 1 )); }

# use_gpus COUNT: show a job the first COUNT of the visible GPUs, and none where it has no claim to any.
use_gpus() {
    local visible=${CUDA_VISIBLE_DEVICES-$(seq -s , 0 63)}
    export CUDA_VISIBLE_DEVICES=
    if [ "$1" != 0 ]; then CUDA_VISIBLE_DEVICES=$(cut -d , -f "1-$1" <<<"$visible"); fi
}
