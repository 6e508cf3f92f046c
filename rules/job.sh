# What the shell commands of the rules call.

# outlive_signals: a signal sent to the whole job also reaches its shells: ignore it and wait for the job, which may have
# to save itself. A subshell, such as braces in a pipeline, forgets it and must call this again.
outlive_signals() { trap : INT TERM; }
outlive_signals

# begin LOG: Snakemake deletes LOG before every attempt and keeps only the last benchmark. Beside it stay, over all
# attempts, LOG's .history.log with what they printed and .attempts.tsv with the time they took.
begin() {
    log=$1 history=${1%.log}.history.log attempts=${1%.log}.attempts.tsv began=$EPOCHSECONDS
    export JOB_ERROR=${1%.log}.error # a mistake of the user's: common/errors.py writes it, common/failed_jobs.py shows it
    rm -f "$JOB_ERROR"
    echo "---- $(date -Is) on $(uname -n)" >>"$history"
    trap 'ended $?' EXIT
}

# logged: to the terminal and to the logs. It outlives an interrupt, so that the job can report how it saved.
logged() { (trap "" INT TERM; exec tee -a "$log" "$history"); }

# ended STATUS: runs when the attempt is over, however it ended unless it was killed outright.
ended() {
    if [ -f "$JOB_ERROR" ]; then tee -a "$log" <"$JOB_ERROR" >>"$history"; fi
    if [ ! -f "$attempts" ]; then printf 'began\thost\tstatus\tseconds\ttotal_seconds\n' >"$attempts"; fi
    local seconds=$((EPOCHSECONDS - began)) before
    before=$(tail -n 1 "$attempts" | cut -f 5)
    printf '%(%FT%T%z)T\t%s\t%s\t%s\t%s\n' \
        "$began" "$(uname -n)" "$1" "$seconds" $((seconds + ${before//[!0-9]/}+0)) >>"$attempts"
}

# share THREADS PROCESSES: what each of the processes may have of a job's threads.
share() { echo $(( $1 > $2 ? $1 / $2 : 1 )); }
