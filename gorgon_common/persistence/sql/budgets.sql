-- Reservations on PostgreSQL: the counterpart of budgets_sqlite.py.  Each function is one round trip.
--
-- Lock order: the reservation, then its accounts from leaf to root (level descending, then id).
--
-- Plans are made while the tables are still small, and are then kept.  The settings prevent plans that scan a whole
-- table.

-- Process many calls in one transaction.  First post the outcomes of some (p_facts, see gorgon_settle), then reserve for
-- others in their order, each on every account of its path or on none.  One update per account, however many calls.
-- p_asks    [{place, step_id, token, ordinal, accounts, usd (micro-dollars), tokens, max_tokens (longest reply)}], no call
--           twice; accounts from leaf to root
-- p_offset  shifts the clock, in seconds, so that tests can move into another period
--
-- Returns a row for each ask.  what: 1 held; 2 this reservation already existed (state: its present state); 3 short: the
-- account without enough room; 4 the account's period is not the current one.  claimed: the amounts due first to steps
-- that have waited longer.
CREATE OR REPLACE FUNCTION gorgon_exchange(p_facts jsonb, p_asks jsonb, p_offset float8) RETURNS TABLE (
    place int, what smallint, state smallint, max_tokens int, usd bigint, tokens bigint, period_id bigint,
    usd_limit bigint, usd_spent bigint, usd_reserved bigint, token_limit bigint, token_spent bigint,
    token_reserved bigint, usd_claimed bigint, token_claimed bigint
) LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    present timestamptz := clock_timestamp() + make_interval(secs => p_offset);
    account budget_periods%ROWTYPE;
    accounts budget_periods[];
    ids bigint[];
    usd_taken bigint[];
    token_taken bigint[];
    held int[] := '{}';
    usd_first bigint;
    token_first bigint;
    short_of int;
    at int;
    ask record;
    made int;
    -- Usually no step waits for room anywhere, and nothing has to be looked up for each ask.
    awaited boolean := EXISTS (SELECT 1 FROM budget_waits);
BEGIN
    IF p_facts IS NOT NULL THEN
        PERFORM 1 FROM reservations r JOIN jsonb_to_recordset(p_facts) AS f(step_id bigint, token int, ordinal smallint)
            ON r.step_id = f.step_id AND r.token = f.token AND r.ordinal = f.ordinal
        ORDER BY r.step_id, r.token, r.ordinal FOR UPDATE OF r;
    END IF;
    PERFORM 1 FROM budget_periods b
    WHERE b.id = ANY (ARRAY(
        SELECT id::bigint FROM jsonb_array_elements(p_asks) x, jsonb_array_elements_text(x -> 'accounts') id
        UNION
        SELECT unnest(r.accounts) FROM jsonb_to_recordset(p_facts) AS f(step_id bigint, token int, ordinal smallint)
        JOIN reservations r ON r.step_id = f.step_id AND r.token = f.token AND r.ordinal = f.ordinal
    )) ORDER BY b.level DESC, b.id FOR UPDATE OF b;
    IF p_facts IS NOT NULL THEN
        PERFORM gorgon_settle(p_facts);
    END IF;
    SELECT array_agg(b ORDER BY b.id), array_agg(b.id ORDER BY b.id), array_agg(0::bigint), array_agg(0::bigint)
    INTO accounts, ids, usd_taken, token_taken
    FROM budget_periods b
    WHERE b.id = ANY (ARRAY(
        SELECT DISTINCT id::bigint FROM jsonb_array_elements(p_asks) x, jsonb_array_elements_text(x -> 'accounts') id
    ));
    FOR ask IN
        SELECT x.*, r.state AS was, r.usd AS was_usd, r.tokens AS was_tokens, r.max_tokens AS was_max
        FROM jsonb_to_recordset(p_asks) AS x(place int, step_id bigint, token int, ordinal smallint,
            accounts bigint[], usd bigint, tokens bigint, max_tokens int)
        LEFT JOIN reservations r ON r.step_id = x.step_id AND r.token = x.token AND r.ordinal = x.ordinal
        ORDER BY x.place
    LOOP
        period_id := NULL; usd_limit := NULL; usd_spent := NULL; usd_reserved := NULL; token_limit := NULL;
        token_spent := NULL; token_reserved := NULL; usd_claimed := NULL; token_claimed := NULL;
        IF ask.was IS NOT NULL THEN
            place := ask.place; what := 2; state := ask.was; max_tokens := ask.was_max; usd := ask.was_usd;
            tokens := ask.was_tokens;
            RETURN NEXT;
            CONTINUE;
        END IF;
        short_of := NULL;
        FOR number IN 1 .. cardinality(ask.accounts) LOOP
            at := array_position(ids, ask.accounts[number]);
            IF at IS NULL THEN
                RAISE EXCEPTION 'there is no account %', ask.accounts[number] USING ERRCODE = 'serialization_failure';
            END IF;
            account := accounts[at];
            usd_first := 0;
            token_first := 0;
            IF account.waited_for THEN
                SELECT c.usd, c.tokens INTO usd_first, token_first FROM gorgon_claimed(account, ask.step_id) c;
            END IF;
            IF account.usd_limit - account.usd_spent - account.usd_overrun - account.usd_reserved - usd_taken[at]
                    - usd_first < ask.usd
                OR account.token_limit - account.token_spent - account.token_overrun - account.token_reserved
                    - token_taken[at] - token_first < ask.tokens
                OR account.starts_at > present OR account.ends_at <= present
            THEN
                short_of := at;
                EXIT;
            END IF;
        END LOOP;
        place := ask.place;
        IF short_of IS NULL THEN
            FOR number IN 1 .. cardinality(ask.accounts) LOOP
                at := array_position(ids, ask.accounts[number]);
                usd_taken[at] := usd_taken[at] + ask.usd;
                token_taken[at] := token_taken[at] + ask.tokens;
            END LOOP;
            held := held || ask.place;
            IF awaited THEN  -- a step that has its room does not keep a claim on more, before those that ask next
                DELETE FROM budget_waits w WHERE w.step_id = ask.step_id;
            END IF;
            what := 1; state := 0; max_tokens := ask.max_tokens; usd := ask.usd; tokens := ask.tokens;
        ELSE
            what := CASE WHEN account.starts_at > present OR account.ends_at <= present THEN 4 ELSE 3 END;
            state := NULL; max_tokens := NULL; usd := NULL; tokens := NULL;
            period_id := account.id;
            usd_limit := account.usd_limit;
            usd_spent := account.usd_spent + account.usd_overrun;
            usd_reserved := account.usd_reserved + usd_taken[short_of];
            token_limit := account.token_limit;
            token_spent := account.token_spent + account.token_overrun;
            token_reserved := account.token_reserved + token_taken[short_of];
            usd_claimed := usd_first;
            token_claimed := token_first;
        END IF;
        RETURN NEXT;
    END LOOP;
    IF cardinality(held) = 0 THEN
        RETURN;
    END IF;
    WITH asks AS (
        SELECT *
        FROM jsonb_to_recordset(p_asks) AS x(place int, step_id bigint, token int, ordinal smallint,
            accounts bigint[], usd bigint, tokens bigint, max_tokens int)
    ), stored AS (
        INSERT INTO reservations (step_id, token, ordinal, at, state, usd, tokens, max_tokens, accounts)
        SELECT a.step_id, a.token, a.ordinal, present, 0, a.usd, a.tokens, a.max_tokens, a.accounts
        FROM asks a WHERE a.place = ANY (held) ON CONFLICT DO NOTHING
        RETURNING step_id, token, ordinal, usd, tokens, accounts
    ), posted AS (
        INSERT INTO postings (period_id, step_id, token, ordinal, kind, usd_reserved, usd_spent, usd_overrun,
            token_reserved, token_spent, token_overrun, at)
        SELECT id, step_id, token, ordinal, 0, usd, 0, 0, tokens, 0, 0, present
        FROM stored, unnest(accounts) id
    )
    SELECT count(*) INTO made FROM stored;
    IF made < cardinality(held) THEN
        RAISE EXCEPTION 'a call was reserved at the same time by another' USING ERRCODE = 'serialization_failure';
    END IF;
    UPDATE budget_periods b SET usd_reserved = b.usd_reserved + x.usd, token_reserved = b.token_reserved + x.tokens
    FROM unnest(ids, usd_taken, token_taken) AS x(id, usd, tokens)
    WHERE b.id = x.id AND (x.usd > 0 OR x.tokens > 0);
END $$;

-- The amounts of an account that are due to steps that have waited longer than p_step.  It includes only steps that
-- could run if every reservation were released.  A claim ends at its `until`.
CREATE OR REPLACE FUNCTION gorgon_claimed(
    p_account budget_periods, p_step bigint, OUT usd bigint, OUT tokens bigint
) LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
BEGIN
    SELECT coalesce(sum(w.usd), 0), coalesce(sum(w.tokens), 0) INTO usd, tokens
    FROM budget_waits w JOIN steps s ON s.id = w.step_id
    WHERE w.period_id = p_account.id AND w.step_id < p_step AND w.until > clock_timestamp()
        AND (w.woken OR NOT w.patient) AND s.status IN (1, 2, 3)
        AND w.usd <= coalesce(p_account.usd_limit - p_account.usd_spent - p_account.usd_overrun, w.usd)
        AND w.tokens <= coalesce(p_account.token_limit - p_account.token_spent - p_account.token_overrun, w.tokens);
END $$;

-- Post the outcomes of reserved calls.
-- p_facts  [{step_id, token, ordinal, state (1 settled, 2 released, 3 unknown), usd (micro-dollars), tokens}]
-- These are facts: they are never fenced, and posting them again changes nothing.  They are posted together: one change
-- of each account, from leaf to root, however many calls.  Unknown is posted in full; a later
-- settlement corrects it.  An amount that is NULL counts as unknown.
CREATE OR REPLACE FUNCTION gorgon_settle(p_facts jsonb) RETURNS int
LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    change record;
    account budget_periods%ROWTYPE;
    reached int;
BEGIN
    FOR change IN
        WITH locked AS MATERIALIZED (
            SELECT r.step_id, r.token, r.ordinal, r.usd, r.tokens, r.accounts, r.state AS was,
                CASE WHEN f.state = 1 AND ((f.usd IS NULL AND r.usd > 0) OR f.tokens IS NULL) THEN 3 ELSE f.state END
                    AS state,
                CASE WHEN f.state = 2 THEN 0 WHEN f.state = 3 THEN r.usd ELSE coalesce(f.usd, r.usd) END AS usd_now,
                CASE WHEN f.state = 2 THEN 0 WHEN f.state = 3 THEN r.tokens ELSE coalesce(f.tokens, r.tokens) END
                    AS tokens_now
            FROM (
                -- Of several facts about a call, the first one that says the most.
                SELECT DISTINCT ON (x.step_id, x.token, x.ordinal) x.*
                FROM ROWS FROM (
                    jsonb_to_recordset(p_facts)
                        AS (step_id bigint, token int, ordinal smallint, state smallint, usd bigint, tokens bigint)
                ) WITH ORDINALITY AS x(step_id, token, ordinal, state, usd, tokens, place)
                ORDER BY x.step_id, x.token, x.ordinal,
                    CASE WHEN x.state = 2 OR (x.state = 1 AND x.usd IS NOT NULL AND x.tokens IS NOT NULL) THEN 0
                        WHEN x.state = 1 AND x.tokens IS NOT NULL THEN 1 ELSE 2 END,
                    x.place
            ) f JOIN reservations r ON r.step_id = f.step_id AND r.token = f.token AND r.ordinal = f.ordinal
            WHERE r.state = 0 OR (r.state = 3 AND f.state <> 3
                AND (f.state = 2 OR (f.usd IS NOT NULL OR r.usd = 0) AND f.tokens IS NOT NULL))
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
            PERFORM gorgon_tell(account, change.step_id >> 20, 'budget.overrun', NULL,
                'a call used more than had been reserved for it: ' || greatest(change.usd_overrun, 0)
                || ' micro-dollars, ' || greatest(change.token_overrun, 0) || ' tokens');
        END IF;
        SELECT max(mark) INTO reached FROM unnest(ARRAY[50, 80, 100]) mark
        WHERE mark > account.alerted
            AND ((account.usd_limit IS NOT NULL AND (account.usd_spent + account.usd_overrun) * 100
                    >= account.usd_limit * mark)
                OR (account.token_limit IS NOT NULL AND (account.token_spent + account.token_overrun) * 100
                    >= account.token_limit * mark));
        IF reached IS NOT NULL THEN
            UPDATE budget_periods b SET alerted = reached WHERE b.id = account.id;
            PERFORM gorgon_tell(account, change.step_id >> 20, 'budget.alert', reached, reached || ' % is spent');
        END IF;
    END LOOP;
    RETURN 0;
END $$;

-- Record a message about an account in the journal of the run, and in budget_alerts, from which it is reported.
CREATE OR REPLACE FUNCTION gorgon_tell(p_account budget_periods, p_run bigint, p_kind text, p_mark int, p_said text)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO events (run_id, kind, at, message)
    VALUES (p_run, p_kind, clock_timestamp(), p_account.label || ': ' || p_said);
    INSERT INTO budget_alerts (org_id, period_id, run_id, kind, mark, at, message)
    VALUES (p_account.org_id, p_account.id, p_run, p_kind, p_mark, clock_timestamp(), p_account.label || ': ' || p_said);
END $$;

-- Wake the steps that wait for room on an account, as many as fit, oldest first.  They keep their claim for p_grace
-- seconds, so that no step that came later takes their room.  If nothing is reserved any more, steps that need more
-- than there is are woken too, to be refused: no room can become free for them.  The caller has locked the account.
CREATE OR REPLACE FUNCTION gorgon_make_room(p_period bigint, p_grace float8 DEFAULT 10) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
BEGIN
    DELETE FROM budget_waits w WHERE w.period_id = p_period
        AND (w.woken AND coalesce(w.until <= clock_timestamp(), true)
            OR NOT EXISTS (SELECT 1 FROM steps s WHERE s.id = w.step_id AND s.status IN (1, 2, 3)));
    WITH account AS (
        SELECT b.usd_limit - b.usd_spent - b.usd_overrun - b.usd_reserved AS usd,
            b.token_limit - b.token_spent - b.token_overrun - b.token_reserved AS tokens,
            b.usd_reserved = 0 AND b.token_reserved = 0 AS idle
        FROM budget_periods b WHERE b.id = p_period
    ), line AS (
        SELECT w.step_id, w.woken,
            w.usd > coalesce(a.usd, w.usd) OR w.tokens > coalesce(a.tokens, w.tokens) AS too_large, a.idle, w.patient,
            a.usd AS usd_room, a.tokens AS token_room, w.usd, w.tokens
        FROM budget_waits w, account a WHERE w.period_id = p_period
    ), fair AS (
        SELECT l.step_id, sum(l.usd) OVER (ORDER BY l.step_id) <= coalesce(l.usd_room, sum(l.usd) OVER (ORDER BY l.step_id))
            AND sum(l.tokens) OVER (ORDER BY l.step_id)
                <= coalesce(l.token_room, sum(l.tokens) OVER (ORDER BY l.step_id)) AS fits, l.woken
        FROM line l WHERE NOT (l.too_large AND (l.patient OR l.idle))
    ), woken AS (
        UPDATE budget_waits w SET woken = true, until = clock_timestamp() + make_interval(secs => p_grace)
        WHERE w.period_id = p_period AND NOT w.woken AND w.step_id IN (
            SELECT f.step_id FROM fair f WHERE f.fits
            UNION ALL SELECT l.step_id FROM line l WHERE l.too_large AND l.idle AND NOT l.patient
        )
        RETURNING w.step_id
    )
    UPDATE steps s SET due = clock_timestamp() FROM woken w WHERE s.id = w.step_id AND s.status = 3;
    UPDATE budget_periods b SET waited_for = false
    WHERE b.id = p_period AND NOT EXISTS (SELECT 1 FROM budget_waits w WHERE w.period_id = p_period);
END $$;
