-- Reservations on PostgreSQL.  What budgets_sqlite.py does, each function one round trip.
--
-- Locks are taken in one order: the reservation, then its accounts from leaf to root (level descending, then id).

-- Hold what a call may cost on every account of p_path (leaf to root), or on none.
-- p_offset moves the clock, in seconds: tests turn periods with it.
--
-- Returns one row: what 1 held, 2 this reservation was made before (state says what became of it), 3 short: the account
-- that has no room, 4 the account's period is not the present one (any more).
CREATE OR REPLACE FUNCTION gorgon_reserve(
    p_step bigint, p_token int, p_ordinal smallint, p_path bigint[], p_usd bigint, p_tokens bigint, p_max int,
    p_offset float8
) RETURNS TABLE (
    what smallint, state smallint, max_tokens int, usd bigint, tokens bigint, period_id bigint, usd_limit bigint,
    usd_spent bigint, usd_reserved bigint, token_limit bigint, token_spent bigint, token_reserved bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    present timestamptz := clock_timestamp() + make_interval(secs => p_offset);
    account budget_periods%ROWTYPE;
    known reservations%ROWTYPE;
BEGIN
    INSERT INTO reservations (step_id, token, ordinal, at, state, usd, tokens, max_tokens, accounts)
    VALUES (p_step, p_token, p_ordinal, present, 0, p_usd, p_tokens, p_max, p_path) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        SELECT * INTO known FROM reservations r
        WHERE r.step_id = p_step AND r.token = p_token AND r.ordinal = p_ordinal;
        RETURN QUERY SELECT 2::smallint, known.state, known.max_tokens, known.usd, known.tokens, NULL::bigint,
            NULL::bigint, NULL::bigint, NULL::bigint, NULL::bigint, NULL::bigint, NULL::bigint;
        RETURN;
    END IF;
    FOR place IN 1 .. cardinality(p_path) LOOP
        UPDATE budget_periods b
        SET usd_reserved = b.usd_reserved + p_usd, token_reserved = b.token_reserved + p_tokens
        WHERE b.id = p_path[place]
            AND (b.usd_limit IS NULL OR b.usd_limit - b.usd_spent - b.usd_overrun - b.usd_reserved >= p_usd)
            AND (b.token_limit IS NULL
                OR b.token_limit - b.token_spent - b.token_overrun - b.token_reserved >= p_tokens)
            AND (b.starts_at IS NULL OR b.starts_at <= present) AND (b.ends_at IS NULL OR b.ends_at > present);
        IF NOT FOUND THEN
            SELECT * INTO account FROM budget_periods b WHERE b.id = p_path[place];
            UPDATE budget_periods b
            SET usd_reserved = b.usd_reserved - p_usd, token_reserved = b.token_reserved - p_tokens
            WHERE b.id = ANY (p_path[1 : place - 1]);
            DELETE FROM reservations r WHERE r.step_id = p_step AND r.token = p_token AND r.ordinal = p_ordinal;
            RETURN QUERY SELECT
                CASE WHEN coalesce(account.starts_at <= present, true) AND coalesce(account.ends_at > present, true)
                    THEN 3 ELSE 4 END::smallint,
                NULL::smallint, NULL::int, NULL::bigint, NULL::bigint, account.id, account.usd_limit,
                account.usd_spent + account.usd_overrun, account.usd_reserved, account.token_limit,
                account.token_spent + account.token_overrun, account.token_reserved;
            RETURN;
        END IF;
    END LOOP;
    INSERT INTO postings (period_id, step_id, token, ordinal, kind, usd_reserved, usd_spent, usd_overrun,
        token_reserved, token_spent, token_overrun, at)
    SELECT id, p_step, p_token, p_ordinal, 0, p_usd, 0, 0, p_tokens, 0, 0, present FROM unnest(p_path) id;
    RETURN QUERY SELECT 1::smallint, 0::smallint, p_max, p_usd, p_tokens, NULL::bigint, NULL::bigint,
        NULL::bigint, NULL::bigint, NULL::bigint, NULL::bigint, NULL::bigint;
END $$;

-- The same for many calls in one transaction.
-- p_asks  [{i step, t token, n ordinal, p path, c micro-dollars, k tokens, m longest reply}]
-- Their accounts are locked first, in the order in which all lock them: call by call they would be locked crosswise.
CREATE OR REPLACE FUNCTION gorgon_reserve_all(p_asks jsonb, p_offset float8) RETURNS TABLE (
    what smallint, state smallint, max_tokens int, usd bigint, tokens bigint, period_id bigint, usd_limit bigint,
    usd_spent bigint, usd_reserved bigint, token_limit bigint, token_spent bigint, token_reserved bigint, place int
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    ask record;
BEGIN
    PERFORM 1 FROM budget_periods b
    WHERE b.id = ANY (ARRAY(
        SELECT DISTINCT id::bigint FROM jsonb_array_elements(p_asks) x, jsonb_array_elements_text(x -> 'p') id
    )) ORDER BY b.level DESC, b.id FOR UPDATE OF b;
    FOR ask IN
        SELECT x.*, row_number() OVER () AS o
        FROM jsonb_to_recordset(p_asks) AS x(i bigint, t int, n smallint, p bigint[], c bigint, k bigint, m int)
    LOOP
        RETURN QUERY SELECT r.*, ask.o::int
        FROM gorgon_reserve(ask.i, ask.t, ask.n, ask.p, ask.c, ask.k, ask.m, p_offset) r;
    END LOOP;
END $$;

-- Post what became of reserved calls.
-- p_facts  [{i step, t token, n ordinal, s state: 1 settled, 2 released, 3 unknown, c micro-dollars, k tokens}]
-- A fact: never fenced, and what is said again changes nothing.  Unknown is posted in full; a settlement that comes
-- after it corrects it.  Amounts that are NULL are not known either.
CREATE OR REPLACE FUNCTION gorgon_settle(p_facts jsonb) RETURNS int LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    change record;
    account budget_periods%ROWTYPE;
    reached int;
BEGIN
    FOR change IN
        WITH locked AS MATERIALIZED (
            SELECT r.step_id, r.token, r.ordinal, r.usd, r.tokens, r.accounts, r.state AS was,
                CASE WHEN f.s = 1 AND ((f.c IS NULL AND r.usd > 0) OR f.k IS NULL) THEN 3 ELSE f.s END AS state,
                CASE WHEN f.s = 2 THEN 0 WHEN f.s = 3 THEN r.usd ELSE coalesce(f.c, r.usd) END AS usd_now,
                CASE WHEN f.s = 2 THEN 0 WHEN f.s = 3 THEN r.tokens ELSE coalesce(f.k, r.tokens) END AS tokens_now
            FROM (
                SELECT DISTINCT ON (i, t, n) *
                FROM jsonb_to_recordset(p_facts) AS x(i bigint, t int, n smallint, s smallint, c bigint, k bigint)
            ) f JOIN reservations r ON r.step_id = f.i AND r.token = f.t AND r.ordinal = f.n
            WHERE r.state = 0 OR (r.state = 3 AND f.s <> 3 AND (f.s = 2 OR (f.c IS NOT NULL OR r.usd = 0) AND f.k IS NOT NULL))
            ORDER BY r.step_id, r.token, r.ordinal FOR UPDATE OF r
        ), closed AS (
            UPDATE reservations r SET state = l.state, usd_posted = l.usd_now, tokens_posted = l.tokens_now
            FROM locked l WHERE r.step_id = l.step_id AND r.token = l.token AND r.ordinal = l.ordinal
        ), posted AS (
            INSERT INTO postings (period_id, step_id, token, ordinal, kind, usd_reserved, usd_spent, usd_overrun,
                token_reserved, token_spent, token_overrun, at)
            SELECT id, l.step_id, l.token, l.ordinal, CASE WHEN l.was = 3 THEN 4 ELSE l.state END,
                CASE WHEN l.was = 3 THEN 0 ELSE -l.usd END,
                least(l.usd_now, l.usd) - CASE WHEN l.was = 3 THEN l.usd ELSE 0 END, greatest(l.usd_now - l.usd, 0),
                CASE WHEN l.was = 3 THEN 0 ELSE -l.tokens END,
                least(l.tokens_now, l.tokens) - CASE WHEN l.was = 3 THEN l.tokens ELSE 0 END,
                greatest(l.tokens_now - l.tokens, 0), clock_timestamp()
            FROM locked l, unnest(l.accounts) id
            RETURNING period_id, step_id, usd_reserved, usd_spent, usd_overrun, token_reserved, token_spent,
                token_overrun
        )
        SELECT p.period_id, min(p.step_id) AS step_id, sum(p.usd_reserved)::bigint AS usd_reserved,
            sum(p.usd_spent)::bigint AS usd_spent, sum(p.usd_overrun)::bigint AS usd_overrun,
            sum(p.token_reserved)::bigint AS token_reserved, sum(p.token_spent)::bigint AS token_spent,
            sum(p.token_overrun)::bigint AS token_overrun
        FROM posted p JOIN budget_periods b ON b.id = p.period_id
        GROUP BY p.period_id, b.level ORDER BY b.level DESC, p.period_id
    LOOP
        UPDATE budget_periods b SET
            usd_reserved = b.usd_reserved + change.usd_reserved, usd_spent = b.usd_spent + change.usd_spent,
            usd_overrun = b.usd_overrun + change.usd_overrun,
            token_reserved = b.token_reserved + change.token_reserved,
            token_spent = b.token_spent + change.token_spent, token_overrun = b.token_overrun + change.token_overrun
        WHERE b.id = change.period_id RETURNING * INTO account;
        IF account.waited_for THEN
            PERFORM gorgon_make_room(account.id);
        END IF;
        IF change.usd_overrun > 0 OR change.token_overrun > 0 THEN
            INSERT INTO events (run_id, kind, at, message) VALUES (change.step_id >> 20, 'budget.overrun',
                clock_timestamp(), account.label || ': a call used more than had been reserved for it: '
                || greatest(change.usd_overrun, 0) || ' micro-dollars, ' || greatest(change.token_overrun, 0)
                || ' tokens');
        END IF;
        SELECT max(mark) INTO reached FROM unnest(ARRAY[50, 80, 100]) mark
        WHERE mark > account.alerted
            AND ((account.usd_limit IS NOT NULL AND (account.usd_spent + account.usd_overrun) * 100
                    >= account.usd_limit * mark)
                OR (account.token_limit IS NOT NULL AND (account.token_spent + account.token_overrun) * 100
                    >= account.token_limit * mark));
        IF reached IS NOT NULL THEN
            UPDATE budget_periods b SET alerted = reached WHERE b.id = account.id;
            INSERT INTO events (run_id, kind, at, message) VALUES (change.step_id >> 20, 'budget.alert',
                clock_timestamp(), account.label || ': ' || reached || ' % is spent');
        END IF;
    END LOOP;
    RETURN 0;
END $$;

-- Wake the steps that wait for room on an account: as many as fit, the oldest first.  Where nothing is reserved any more,
-- no room can come that way: all are woken but those that wait for the next period.  The caller has locked the account.
CREATE OR REPLACE FUNCTION gorgon_make_room(p_period bigint) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    DELETE FROM budget_waits w WHERE w.period_id = p_period
        AND NOT EXISTS (SELECT 1 FROM steps s WHERE s.id = w.step_id AND s.status = 3);
    WITH account AS (
        SELECT b.usd_limit - b.usd_spent - b.usd_overrun - b.usd_reserved AS usd,
            b.token_limit - b.token_spent - b.token_overrun - b.token_reserved AS tokens,
            b.usd_reserved = 0 AND b.token_reserved = 0 AS idle
        FROM budget_periods b WHERE b.id = p_period
    ), line AS (
        SELECT w.step_id, w.patient, a.usd AS usd_room, a.tokens AS token_room, a.idle,
            sum(w.usd) OVER (ORDER BY w.step_id) AS usd, sum(w.tokens) OVER (ORDER BY w.step_id) AS tokens
        FROM budget_waits w, account a
        WHERE w.period_id = p_period
            AND NOT (w.patient AND (w.usd > coalesce(a.usd, w.usd) OR w.tokens > coalesce(a.tokens, w.tokens)))
    ), woken AS (
        DELETE FROM budget_waits w USING line l
        WHERE w.step_id = l.step_id
            AND ((l.idle AND NOT l.patient)
                OR (l.usd <= coalesce(l.usd_room, l.usd) AND l.tokens <= coalesce(l.token_room, l.tokens)))
        RETURNING w.step_id
    )
    UPDATE steps s SET due = clock_timestamp() FROM woken w WHERE s.id = w.step_id AND s.status = 3;
    UPDATE budget_periods b SET waited_for = false
    WHERE b.id = p_period AND NOT EXISTS (SELECT 1 FROM budget_waits w WHERE w.period_id = p_period);
END $$;
