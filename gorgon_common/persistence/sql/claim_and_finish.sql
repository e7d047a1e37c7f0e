-- One transaction of the engine on PostgreSQL: claims and finishes steps, and updates the steps that depend on them.
--
-- The order of the parts, and of the rows within each part, is a fixed lock order: own rows first, then successors and
-- parents ascending.  Two workers that finish steps of the same run therefore cannot deadlock.  Each part is a function
-- of its own; each of its statements sees what was committed while the previous one waited for a lock.
--
-- p_claims    step ids from a message, as a hint; only rows that are ready are claimed
-- p_finishes  [{step_id, token, status, output, blob, detail, attempts, started_at, finished_at, root_id, fingerprint}]
-- p_calls     [rows of the ledger]: facts, stored even if the fence refuses the finish
-- p_skips     [{step_id, detail}]: descendants that are skipped together with the only finish of this call
-- p_fast, p_slow  how many fast and slow steps the caller may take over; p_pull: how many from the backlog
-- p_suspects  whether suspects (steps with two crashes or more) may be claimed
--
-- A worker whose lease has expired may still finish steps that no other worker has taken, but it gets no new step: each
-- statement that claims reads the worker's row, once.  `due` of a running step is the time at which it was claimed.
--
-- Returns rows (what, …); those of 3 to 6 have only an id:
--   1  the caller holds the step now
--   2  the step is ready and owed a message
--   3  the fence refused the finish
--   4  the step is slow and its run has `max_parallel`; `Store.claim_limited`, which keeps the count, claims it
--   5  (without an id) the caller's lease has expired, so none of p_claims was claimed
--   6  the step is ready and a suspect; see p_suspects
DROP TYPE IF EXISTS gorgon_transition CASCADE;
CREATE TYPE gorgon_transition AS (
    what smallint, id bigint, token int, node int, weight smallint, queue smallint, attempt smallint, parent int,
    "position" int, crashes smallint, unmet boolean
);

CREATE OR REPLACE FUNCTION gorgon_claim_and_finish(
    p_owner int, p_target text, p_home text, p_queues smallint[], p_lost interval,
    p_fast int, p_slow int, p_pull int, p_suspects boolean,
    p_claims bigint[], p_finishes jsonb, p_calls jsonb, p_skips jsonb
) RETURNS SETOF gorgon_transition LANGUAGE plpgsql AS $$
DECLARE
    ended bigint[];
    edges bigint[];
    unmet_edges bigint[];
    pulled bigint[];
    brought int := 0;
BEGIN
    IF p_calls IS NOT NULL THEN
        PERFORM gorgon_store_calls(p_calls);
    END IF;
    IF p_finishes IS NOT NULL THEN
        SELECT f.ended, f.edges, f.unmet_edges INTO ended, edges, unmet_edges FROM gorgon_end_steps(p_finishes) f;
        IF ended IS NULL OR cardinality(ended) < jsonb_array_length(p_finishes) THEN
            RETURN QUERY
            SELECT (gorgon_about(3, f.step_id)).* FROM jsonb_to_recordset(p_finishes) AS f(step_id bigint)
            WHERE ended IS NULL OR f.step_id <> ALL (ended);
        END IF;
    END IF;
    IF p_skips IS NOT NULL AND ended IS NOT NULL THEN
        SELECT edges || s.after, unmet_edges || s.after INTO edges, unmet_edges FROM gorgon_skip_steps(p_skips) s(after);
    END IF;
    IF edges IS NOT NULL THEN
        RETURN QUERY SELECT * FROM gorgon_advance(p_owner, p_queues, p_lost, p_fast, p_slow, edges, unmet_edges);
        GET DIAGNOSTICS brought = ROW_COUNT;
    END IF;
    IF p_pull > brought THEN
        pulled := gorgon_pull(p_owner, p_target, p_home, p_queues, p_pull - brought, p_suspects);
        p_claims := CASE WHEN pulled IS NULL THEN p_claims ELSE p_claims || pulled END;
    END IF;
    IF p_claims IS NOT NULL THEN
        RETURN QUERY SELECT * FROM gorgon_claim(p_owner, p_target, p_home, p_lost, p_suspects, p_claims);
        GET DIAGNOSTICS brought = ROW_COUNT;
        IF brought < cardinality(p_claims) THEN
            RETURN QUERY
            SELECT * FROM gorgon_unclaimed(p_owner, p_target, p_home, p_lost, p_suspects, p_claims, pulled);
        END IF;
    END IF;
END $$;

CREATE OR REPLACE FUNCTION gorgon_about(p_what int, p_id bigint) RETURNS gorgon_transition LANGUAGE sql IMMUTABLE AS $$
    SELECT ROW(p_what, p_id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)::gorgon_transition
$$;

CREATE OR REPLACE FUNCTION gorgon_store_calls(p_calls jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    stored int;
BEGIN
    INSERT INTO ledger (step_id, token, ordinal, at, provider, model, role, attempt, input_tokens, cache_read_tokens,
        cache_write_tokens, output_tokens, reasoning_tokens, cost_micro, price_version, latency_ms, outcome, request_id)
    SELECT c.step_id, c.token, c.ordinal, c.at, c.provider, c.model, c.role, c.attempt, c.input_tokens,
        c.cache_read_tokens, c.cache_write_tokens, c.output_tokens, c.reasoning_tokens, c.cost_micro,
        c.price_version, c.latency_ms, c.outcome, c.request_id
    FROM jsonb_populate_recordset(NULL::ledger, p_calls) c
    ON CONFLICT DO NOTHING;
    GET DIAGNOSTICS stored = ROW_COUNT;
    IF stored < jsonb_array_length(p_calls) THEN
        -- The result of a call that was presumed lost has arrived after all.
        UPDATE ledger l SET at = c.at, provider = c.provider, model = c.model, role = c.role, attempt = c.attempt,
            input_tokens = c.input_tokens, cache_read_tokens = c.cache_read_tokens,
            cache_write_tokens = c.cache_write_tokens, output_tokens = c.output_tokens,
            reasoning_tokens = c.reasoning_tokens, cost_micro = c.cost_micro, price_version = c.price_version,
            latency_ms = c.latency_ms, outcome = c.outcome, request_id = c.request_id
        FROM jsonb_populate_recordset(NULL::ledger, p_calls) c
        WHERE l.step_id = c.step_id AND l.token = c.token AND l.ordinal = c.ordinal AND l.outcome = 'unknown';
    END IF;
END $$;

-- End the steps whose finishes pass the fence, and store their results.
-- Returns the steps that ended, the steps behind each of their edges (one entry per edge, a child's edge to its
-- composite included), and those behind the edges of steps that did not succeed.  All are NULL if there are none.
CREATE OR REPLACE FUNCTION gorgon_end_steps(
    p_finishes jsonb, OUT ended bigint[], OUT edges bigint[], OUT unmet_edges bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    ids bigint[];
    tokens int[];
    states smallint[];
    any_blob boolean;
    any_fingerprint boolean;
    all_ended boolean;
BEGIN
    -- If a batch finishes two claims of the same step, only the newer one can pass the fence.
    SELECT array_agg(f.step_id), array_agg(f.token), array_agg(f.status), bool_or(f.large), bool_or(f.marked)
        INTO ids, tokens, states, any_blob, any_fingerprint
    FROM (
        SELECT DISTINCT ON (x.step_id) x.step_id, x.token, x.status, x.blob IS NOT NULL AS large,
            x.fingerprint IS NOT NULL AS marked
        FROM jsonb_to_recordset(p_finishes)
            AS x(step_id bigint, token int, status smallint, blob text, fingerprint text)
        ORDER BY x.step_id, x.token DESC
    ) f;
    WITH fenced AS (
        UPDATE steps s SET status = states[array_position(ids, s.id)], owner = NULL
        WHERE s.id = ANY (ids) AND s.token = tokens[array_position(ids, s.id)] AND s.status IN (1, 2)
        RETURNING s.id, s.status,
            CASE WHEN s.parent IS NULL THEN s.successors ELSE s.successors || s.parent END AS after
    )
    SELECT (SELECT array_agg(f.id) FROM fenced f),
        (SELECT array_agg((f.id & ~1048575::bigint) | e) FROM fenced f, unnest(f.after) e),
        (SELECT array_agg((f.id & ~1048575::bigint) | e) FROM fenced f, unnest(f.after) e WHERE f.status <> 5)
        INTO ended, edges, unmet_edges;
    all_ended := cardinality(ended) = jsonb_array_length(p_finishes);

    WITH passed AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(p_finishes) AS x(step_id bigint, token int, status smallint, output text,
            detail text, attempts smallint, started_at timestamptz, finished_at timestamptz)
        WHERE all_ended OR (x.step_id = ANY (ended) AND x.token = tokens[array_position(ids, x.step_id)])
    ), kept AS (
        INSERT INTO checkpoints (step_id, status, attempts, started_at, finished_at, output, detail)
        SELECT p.step_id, p.status, p.attempts, p.started_at, p.finished_at, p.output, p.detail FROM passed p
    )
    INSERT INTO events (run_id, "row", kind, at)
    SELECT p.step_id >> 20, (p.step_id & 1048575)::int,
        CASE p.status WHEN 5 THEN 'step.succeeded' WHEN 6 THEN 'step.failed' WHEN 7 THEN 'step.skipped'
            ELSE 'step.cancelled' END, p.finished_at
    FROM passed p;
    IF any_blob THEN
        INSERT INTO blobs (step_id, body)
        SELECT x.step_id, x.blob FROM jsonb_to_recordset(p_finishes) AS x(step_id bigint, token int, blob text)
        WHERE x.blob IS NOT NULL AND x.step_id = ANY (ended) AND x.token = tokens[array_position(ids, x.step_id)];
    END IF;
    IF any_fingerprint THEN
        INSERT INTO fingerprints (root_id, hash, step_id)
        SELECT x.root_id, x.fingerprint, x.step_id
        FROM jsonb_to_recordset(p_finishes) AS x(step_id bigint, token int, root_id bigint, fingerprint text)
        WHERE x.fingerprint IS NOT NULL AND x.step_id = ANY (ended)
            AND x.token = tokens[array_position(ids, x.step_id)]
        ON CONFLICT DO NOTHING;
    END IF;
END $$;

-- Skip steps that have not started.  Returns the steps behind their edges; NULL if there are none.
CREATE OR REPLACE FUNCTION gorgon_skip_steps(p_skips jsonb) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
    ids bigint[];
    edges bigint[];
BEGIN
    SELECT array_agg(x.step_id ORDER BY x.step_id) INTO ids FROM jsonb_to_recordset(p_skips) AS x(step_id bigint);
    WITH skipped AS (
        UPDATE steps s SET status = 7 WHERE s.id = ANY (ids) AND s.status IN (0, 1)
        RETURNING s.id, CASE WHEN s.parent IS NULL THEN s.successors ELSE s.successors || s.parent END AS after
    ), passed AS MATERIALIZED (
        SELECT x.step_id, x.detail FROM jsonb_to_recordset(p_skips) AS x(step_id bigint, detail text)
        JOIN skipped ON skipped.id = x.step_id
    ), kept AS (
        INSERT INTO checkpoints (step_id, status, attempts, finished_at, detail)
        SELECT p.step_id, 7, 0, clock_timestamp(), p.detail FROM passed p
    ), journaled AS (
        INSERT INTO events (run_id, "row", kind, at)
        SELECT p.step_id >> 20, (p.step_id & 1048575)::int, 'step.skipped', clock_timestamp() FROM passed p
    )
    SELECT array_agg((s.id & ~1048575::bigint) | e) INTO edges FROM skipped s, unnest(s.after) e;
    RETURN edges;
END $$;

-- Count down the steps behind edges.  A step that reaches 0 is taken over by the caller if allowed and possible;
-- otherwise it becomes ready.
CREATE OR REPLACE FUNCTION gorgon_advance(
    p_owner int, p_queues smallint[], p_lost interval, p_fast int, p_slow int, p_edges bigint[], p_unmet_edges bigint[]
) RETURNS SETOF gorgon_transition LANGUAGE plpgsql AS $$
DECLARE
    touched bigint[];
    repeated bigint[];
    counts int[];
BEGIN
    SELECT array_agg(c.id ORDER BY c.id), array_agg(c.id) FILTER (WHERE c.n > 1),
        array_agg(c.n) FILTER (WHERE c.n > 1) INTO touched, repeated, counts
    FROM (SELECT e AS id, count(*)::int AS n FROM unnest(p_edges) e GROUP BY e) c;
    RETURN QUERY
    WITH locked AS MATERIALIZED (
        SELECT s.id, n.times, s.deps_left = n.times AS free, s.weight, s.carried, s.window_next,
            CASE WHEN s.deps_left = n.times
                AND (s.weight = 0 OR (s.queue = ANY (p_queues) AND NOT s.carried AND NOT s.grouped))
            THEN (SELECT r.active AND (r.max_parallel IS NULL OR s.weight < 2) FROM runs r WHERE r.id = s.id >> 20)
            ELSE false END AS ours
        FROM steps s, LATERAL (SELECT coalesce(counts[array_position(repeated, s.id)], 1) AS times) n
        WHERE s.id = ANY (touched) AND s.status IN (0, 3) ORDER BY s.id FOR UPDATE OF s
    ), placed AS MATERIALIZED (
        SELECT l.*, l.ours
            AND row_number() OVER (PARTITION BY l.weight = 2, l.ours ORDER BY l.id)
                <= CASE WHEN l.weight = 2 THEN p_slow ELSE p_fast END
            AND EXISTS (SELECT 1 FROM workers w
                WHERE w.id = p_owner AND NOT w.reaped AND w.lease_until > clock_timestamp())
            AS take
        FROM locked l
    ), moved AS (
        UPDATE steps s SET
            deps_left = s.deps_left - p.times,
            status = CASE WHEN NOT p.free THEN s.status WHEN p.take THEN 2 ELSE 1 END,
            token = s.token + CASE WHEN p.take THEN 1 ELSE 0 END,
            owner = CASE WHEN p.take THEN p_owner END,
            due = CASE WHEN p.take THEN clock_timestamp() WHEN p.free THEN clock_timestamp() + p_lost ELSE s.due END,
            unmet = s.unmet OR coalesce(s.id = ANY (p_unmet_edges), false),
            window_next = least(s.window_end, s.window_next + p.times)
        FROM placed p WHERE s.id = p.id
        RETURNING s.id, s.token, s.node, s.weight, s.queue, s.attempt, s.parent, s.position, s.crashes,
            s.unmet, s.status, p.free, p.carried, p.window_next AS window_was, s.window_next AS window_now
    ), opened AS MATERIALIZED (
        -- A windowed composite releases as many of its next children as have finished.
        SELECT t.id, t.weight,
            CASE WHEN t.weight = 0 OR t.queue = ANY (p_queues)
            THEN (SELECT r.active AND (r.max_parallel IS NULL OR t.weight < 2) FROM runs r WHERE r.id = t.id >> 20)
            ELSE false END AS ours
        FROM moved m, generate_series(m.window_was, m.window_now - 1) w,
            LATERAL (SELECT s.id, s.weight, s.queue FROM steps s
                WHERE s.id = ((m.id & ~1048575::bigint) | w) AND s.status = 0 OFFSET 0) t
    ), entered AS MATERIALIZED (
        -- They take the places that the steps before them have left.
        SELECT o.id, o.ours
            AND row_number() OVER (PARTITION BY o.weight = 2, o.ours ORDER BY o.id)
                <= CASE WHEN o.weight = 2 THEN p_slow - (SELECT count(*) FROM placed WHERE take AND weight = 2)
                    ELSE p_fast - (SELECT count(*) FROM placed WHERE take AND weight < 2) END
            AND EXISTS (SELECT 1 FROM workers w
                WHERE w.id = p_owner AND NOT w.reaped AND w.lease_until > clock_timestamp())
            AS take
        FROM opened o
    ), released AS (
        UPDATE steps s SET
            deps_left = 0,
            status = CASE WHEN e.take THEN 2 ELSE 1 END,
            token = s.token + CASE WHEN e.take THEN 1 ELSE 0 END,
            owner = CASE WHEN e.take THEN p_owner END,
            due = clock_timestamp() + CASE WHEN e.take THEN interval '0' ELSE p_lost END
        FROM entered e WHERE s.id = e.id AND s.status = 0
        RETURNING s.id, s.token, s.node, s.weight, s.queue, s.attempt, s.parent, s.position, s.crashes,
            s.unmet, s.status
    ), journaled AS (
        INSERT INTO events (run_id, "row", kind, at, data)
        SELECT x.id >> 20, (x.id & 1048575)::int, 'step.started', clock_timestamp(), '{"attempt": ' || x.attempt || '}'
        FROM (
            SELECT m.id, m.attempt FROM moved m WHERE m.status = 2 AND m.weight = 2
            UNION ALL
            SELECT r.id, r.attempt FROM released r WHERE r.status = 2 AND r.weight = 2
        ) x
    )
    SELECT CASE WHEN m.status = 2 THEN 1 ELSE 2 END::smallint, m.id, m.token, m.node, m.weight, m.queue, m.attempt,
        m.parent, m.position, m.crashes, m.unmet
    FROM moved m WHERE m.free AND (m.status = 2 OR NOT m.carried)
    UNION ALL
    SELECT CASE WHEN r.status = 2 THEN 1 ELSE 2 END::smallint, r.id, r.token, r.node, r.weight, r.queue, r.attempt,
        r.parent, r.position, r.crashes, r.unmet
    FROM released r;
END $$;

-- Take the first p_count steps of the caller's queues off the backlog.  Returns NULL if there are none.
CREATE OR REPLACE FUNCTION gorgon_pull(
    p_owner int, p_target text, p_home text, p_queues smallint[], p_count int, p_suspects boolean
) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
    pulled bigint[];
BEGIN
    WITH picked AS (
        -- Take the first entries of each queue in index order, so that the whole backlog is never sorted.
        SELECT first.* FROM unnest(p_queues) q, LATERAL (
            SELECT b.queue, b.rank, b.step_id FROM backlog b
            WHERE b.queue = q
                AND (SELECT r.active AND r.target = p_target AND r.home = p_home
                    FROM runs r WHERE r.id = b.step_id >> 20)
                AND (p_suspects OR (SELECT s.crashes < 2 FROM steps s WHERE s.id = b.step_id))
            ORDER BY b.rank, b.step_id LIMIT p_count FOR UPDATE OF b SKIP LOCKED
        ) first
        WHERE EXISTS (SELECT 1 FROM workers w
            WHERE w.id = p_owner AND NOT w.reaped AND w.lease_until > clock_timestamp())
        ORDER BY first.rank, first.step_id LIMIT p_count
    ), gone AS (
        DELETE FROM backlog b USING picked p
        WHERE b.queue = p.queue AND b.rank = p.rank AND b.step_id = p.step_id RETURNING b.step_id
    )
    SELECT array_agg(gone.step_id) INTO pulled FROM gone;
    RETURN pulled;
END $$;

-- Claim ready steps, other than slow ones of runs with `max_parallel`.
CREATE OR REPLACE FUNCTION gorgon_claim(
    p_owner int, p_target text, p_home text, p_lost interval, p_suspects boolean, p_claims bigint[]
) RETURNS SETOF gorgon_transition LANGUAGE plpgsql AS $$
BEGIN
    RETURN QUERY
    WITH claimed AS (
        UPDATE steps s SET status = 2, token = s.token + 1, owner = p_owner, due = clock_timestamp()
        FROM runs r
        WHERE s.id = ANY (p_claims) AND s.status = 1 AND (s.crashes < 2 OR p_suspects)
            AND EXISTS (SELECT 1 FROM workers w
                WHERE w.id = p_owner AND NOT w.reaped AND w.lease_until > clock_timestamp())
            AND r.id = s.id >> 20 AND r.active AND r.target = p_target AND r.home = p_home
            AND (r.max_parallel IS NULL OR s.weight < 2)
        RETURNING s.id, s.token, s.node, s.weight, s.queue, s.attempt, s.parent, s.position, s.crashes, s.unmet
    ), journaled AS (
        INSERT INTO events (run_id, "row", kind, at, data)
        SELECT c.id >> 20, (c.id & 1048575)::int, 'step.started', clock_timestamp(), '{"attempt": ' || c.attempt || '}'
        FROM claimed c WHERE c.weight = 2
    )
    SELECT 1::smallint, c.id, c.token, c.node, c.weight, c.queue, c.attempt, c.parent, c.position, c.crashes, c.unmet
    FROM claimed c;
END $$;

-- Say why steps were not claimed: the lease has expired, or steps are limited by `max_parallel`, or suspects.
CREATE OR REPLACE FUNCTION gorgon_unclaimed(
    p_owner int, p_target text, p_home text, p_lost interval, p_suspects boolean, p_claims bigint[], p_pulled bigint[]
) RETURNS SETOF gorgon_transition LANGUAGE plpgsql AS $$
BEGIN
    -- A step that was taken off the backlog but could not be claimed is owed a message; nothing else would find it.
    UPDATE steps s SET due = clock_timestamp() + p_lost
    WHERE s.id = ANY (p_pulled) AND s.status = 1 AND s.due IS NULL;
    IF NOT EXISTS (SELECT 1 FROM workers w
        WHERE w.id = p_owner AND NOT w.reaped AND w.lease_until > clock_timestamp())
    THEN
        RETURN NEXT gorgon_about(5, NULL);
        RETURN;
    END IF;
    RETURN QUERY
    WITH limited AS (
        UPDATE steps s SET due = clock_timestamp() + p_lost
        FROM runs r
        WHERE s.id = ANY (p_claims) AND s.status = 1 AND s.weight = 2 AND (s.crashes < 2 OR p_suspects)
            AND r.id = s.id >> 20 AND r.active AND r.target = p_target AND r.home = p_home
            AND r.max_parallel IS NOT NULL
        RETURNING s.id
    )
    SELECT (gorgon_about(4, limited.id)).* FROM limited;
    RETURN QUERY
    SELECT (gorgon_about(6, s.id)).* FROM steps s
    WHERE s.id = ANY (p_claims) AND s.status = 1 AND s.crashes >= 2 AND NOT p_suspects;
END $$;
