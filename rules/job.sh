# Functions for the rules' shell commands.

# outlive_signals: a signal sent to the whole job also reaches its shells: ignore it and wait for the job, which may have
# to save itself. Subshells, such as braces in a pipeline, must call this again.
outlive_signals() { trap : INT TERM; }
outlive_signals

# begin LOG: Snakemake deletes LOG before every attempt and keeps only the last benchmark. Next to it, .history.log keeps
# the output of all attempts and .attempts.tsv their times.
begin() {
    log=$1 history=${1%.log}.history.log attempts=${1%.log}.attempts.tsv began=$EPOCHSECONDS
    export JOB_ERROR=${1%.log}.error # a user's mistake: common/errors.py writes it, common/failed_jobs.py shows it
    rm -f "$JOB_ERROR"
    echo "---- $(date -Is) on $(uname -n)" >>"$history"
    trap 'ended $?' EXIT
}

# logged: copy stdin to the terminal and the logs. Ignores interrupts, so that the job can still report how it saved.
logged() { (trap "" INT TERM; exec tee -a "$log" "$history"); }

# ended STATUS: runs at the end of every attempt, unless it was killed with SIGKILL.
ended() {
    if [ -f "$JOB_ERROR" ]; then tee -a "$log" <"$JOB_ERROR" >>"$history"; fi
    if [ ! -f "$attempts" ]; then printf 'began\thost\tstatus\tseconds\ttotal_seconds\n' >"$attempts"; fi
    local seconds=$((EPOCHSECONDS - began)) before
    before=$(tail -n 1 "$attempts" | cut -f 5)
    printf '%(%FT%T%z)T\t%s\t%s\t%s\t%s\n' \
        "$began" "$(uname -n)" "$1" "$seconds" $((seconds + ${before//[!0-9]/}+0)) >>"$attempts"
}

# share THREADS PROCESSES: each process's share of a job's threads.
share() { echo $(( $1 > $2 ? $1 / $2 : 1 )); }
