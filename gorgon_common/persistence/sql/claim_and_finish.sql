-- One transaction of the engine on PostgreSQL: claims and finishes steps, and updates the steps that depend on them.
--
-- The order of the parts, and of the rows within each part, is a fixed lock order: own rows first, then successors and
-- parents ascending.  Two workers that finish steps of the same run therefore cannot deadlock.  Each part is a separate
-- statement, so it sees what was committed while the previous part waited for a lock.
--
-- p_claims    step ids from a message, as a hint; only rows that are ready are claimed
-- p_finishes  [{i id, t token, s status, o output, b blob, d detail, a attempts,
--               st started, en finished, r root run, f fingerprint}]
-- p_calls     [rows of the ledger]: facts, stored even if the fence refuses the finish
-- p_skips     [{i id, d detail}]: descendants that are skipped together with the only finish of this call
-- p_fast, p_slow  how many fast and slow steps the caller may take over; p_pull: how many from the backlog
-- p_suspects  whether suspects (steps with two crashes or more) may be claimed
--
-- A worker whose lease has expired may still finish steps that no other worker has taken, but it gets no new step: each
-- statement that claims reads the worker's row, once.  `due` of a running step is the time at which it was claimed.
--
-- Returns rows (what, …):
--   1  the caller holds the step now
--   2  the step is ready and owed a message
--   3  the fence refused the finish
--   4  the step is slow and its run has `max_parallel`; `Store.admit`, which keeps the count, claims it
--   5  (without an id) the caller's lease has expired, so none of p_claims was claimed
--   6  the step is ready and a suspect; see p_suspects
CREATE OR REPLACE FUNCTION gorgon_claim_and_finish(
    p_owner int, p_target text, p_home text, p_queues smallint[], p_lost interval,
    p_fast int, p_slow int, p_pull int, p_suspects boolean,
    p_claims bigint[], p_finishes jsonb, p_calls jsonb, p_skips jsonb
) RETURNS TABLE (
    what smallint, id bigint, token int, node int, weight smallint, queue smallint,
    attempt smallint, parent int, "position" int, crashes smallint, unmet boolean
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    ids bigint[];
    tokens int[];
    states smallint[];
    large boolean;
    marked boolean;
    done bigint[];
    whole boolean;
    edges bigint[];
    unmet_edges bigint[];
    touched bigint[];
    repeated bigint[];
    times int[];
    pulled bigint[];
    brought int := 0;
BEGIN
    IF p_calls IS NOT NULL THEN
        INSERT INTO ledger (step_id, token, ordinal, at, provider, model, role, attempt, input_tokens,
            cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost_micro, price_version,
            latency_ms, outcome, request_id)
        SELECT c.step_id, c.token, c.ordinal, c.at, c.provider, c.model, c.role, c.attempt, c.input_tokens,
            c.cache_read_tokens, c.cache_write_tokens, c.output_tokens, c.reasoning_tokens, c.cost_micro,
            c.price_version, c.latency_ms, c.outcome, c.request_id
        FROM jsonb_populate_recordset(NULL::ledger, p_calls) c
        ON CONFLICT DO NOTHING;
        GET DIAGNOSTICS brought = ROW_COUNT;
        IF brought < jsonb_array_length(p_calls) THEN
            -- The result of a call that was presumed lost has arrived after all.
            UPDATE ledger l SET at = c.at, provider = c.provider, model = c.model, role = c.role, attempt = c.attempt,
                input_tokens = c.input_tokens, cache_read_tokens = c.cache_read_tokens,
                cache_write_tokens = c.cache_write_tokens, output_tokens = c.output_tokens,
                reasoning_tokens = c.reasoning_tokens, cost_micro = c.cost_micro, price_version = c.price_version,
                latency_ms = c.latency_ms, outcome = c.outcome, request_id = c.request_id
            FROM jsonb_populate_recordset(NULL::ledger, p_calls) c
            WHERE l.step_id = c.step_id AND l.token = c.token AND l.ordinal = c.ordinal AND l.outcome = 'unknown';
        END IF;
        brought := 0;
    END IF;

    IF p_finishes IS NOT NULL THEN
        -- If a batch finishes two claims of the same step, only the newer one can pass the fence.
        SELECT array_agg(x.i), array_agg(x.t), array_agg(x.s), bool_or(x.b), bool_or(x.f)
            INTO ids, tokens, states, large, marked
        FROM (
            SELECT DISTINCT ON (i) i, t, s, b IS NOT NULL AS b, f IS NOT NULL AS f
            FROM jsonb_to_recordset(p_finishes) AS x(i bigint, t int, s smallint, b text, f text) ORDER BY i, t DESC
        ) x;
        WITH fenced AS (
            UPDATE steps s SET status = states[array_position(ids, s.id)], owner = NULL
            WHERE s.id = ANY (ids) AND s.token = tokens[array_position(ids, s.id)] AND s.status IN (1, 2)
            RETURNING s.id, s.status,
                CASE WHEN s.parent IS NULL THEN s.successors ELSE s.successors || s.parent END AS after
        )
        SELECT (SELECT array_agg(f.id) FROM fenced f),
            (SELECT array_agg((f.id & ~1048575::bigint) | e) FROM fenced f, unnest(f.after) e),
            (SELECT array_agg((f.id & ~1048575::bigint) | e) FROM fenced f, unnest(f.after) e WHERE f.status <> 5)
            INTO done, edges, unmet_edges;
        whole := cardinality(done) = jsonb_array_length(p_finishes);

        WITH said AS MATERIALIZED (
            SELECT * FROM jsonb_to_recordset(p_finishes) AS x(i bigint, t int, s smallint, o text, d text, a smallint,
                st timestamptz, en timestamptz)
            WHERE whole OR (i = ANY (done) AND t = tokens[array_position(ids, i)])
        ), kept AS (
            INSERT INTO checkpoints (step_id, status, attempts, started_at, finished_at, output, detail)
            SELECT i, s, a, st, en, o, d FROM said
        )
        INSERT INTO events (run_id, "row", kind, at)
        SELECT i >> 20, (i & 1048575)::int,
            CASE s WHEN 5 THEN 'step.succeeded' WHEN 6 THEN 'step.failed' WHEN 7 THEN 'step.skipped'
                ELSE 'step.cancelled' END, en
        FROM said;
        IF large THEN
            INSERT INTO blobs (step_id, body)
            SELECT i, b FROM jsonb_to_recordset(p_finishes) AS x(i bigint, t int, b text)
            WHERE b IS NOT NULL AND i = ANY (done) AND t = tokens[array_position(ids, i)];
        END IF;
        IF marked THEN
            INSERT INTO fingerprints (root_id, hash, step_id)
            SELECT r, f, i FROM jsonb_to_recordset(p_finishes) AS x(i bigint, t int, r bigint, f text)
            WHERE f IS NOT NULL AND i = ANY (done) AND t = tokens[array_position(ids, i)]
            ON CONFLICT DO NOTHING;
        END IF;
        IF whole IS NOT TRUE THEN
            RETURN QUERY SELECT 3::smallint, x.i, NULL::int, NULL::int, NULL::smallint, NULL::smallint, NULL::smallint,
                NULL::int, NULL::int, NULL::smallint, NULL::boolean
            FROM jsonb_to_recordset(p_finishes) AS x(i bigint)
            WHERE done IS NULL OR x.i <> ALL (done);
        END IF;
    END IF;

    IF p_skips IS NOT NULL AND done IS NOT NULL THEN
        SELECT array_agg(x.i ORDER BY x.i) INTO ids FROM jsonb_to_recordset(p_skips) AS x(i bigint);
        WITH gone AS (
            UPDATE steps s SET status = 7 WHERE s.id = ANY (ids) AND s.status IN (0, 1)
            RETURNING s.id, CASE WHEN s.parent IS NULL THEN s.successors ELSE s.successors || s.parent END AS after
        ), said AS MATERIALIZED (
            SELECT x.i, x.d FROM jsonb_to_recordset(p_skips) AS x(i bigint, d text) JOIN gone ON gone.id = x.i
        ), kept AS (
            INSERT INTO checkpoints (step_id, status, attempts, finished_at, detail)
            SELECT i, 7, 0, clock_timestamp(), d FROM said
        ), told AS (
            INSERT INTO events (run_id, "row", kind, at)
            SELECT i >> 20, (i & 1048575)::int, 'step.skipped', clock_timestamp() FROM said
        )
        SELECT edges || array_agg((g.id & ~1048575::bigint) | e), unmet_edges || array_agg((g.id & ~1048575::bigint) | e)
            INTO edges, unmet_edges FROM gone g, unnest(g.after) e;
    END IF;

    IF edges IS NOT NULL THEN
        -- Each edge out of a finished step is one decrement, including a child's edge to its composite.  A step that
        -- reaches 0 is taken over by the caller if allowed and possible; otherwise it becomes ready.
        SELECT array_agg(c.id ORDER BY c.id), array_agg(c.id) FILTER (WHERE c.n > 1),
            array_agg(c.n) FILTER (WHERE c.n > 1) INTO touched, repeated, times
        FROM (SELECT e AS id, count(*)::int AS n FROM unnest(edges) e GROUP BY e) c;
        RETURN QUERY
        WITH locked AS MATERIALIZED (
            SELECT s.id, n.times, s.deps_left = n.times AS free, s.weight, s.carried, s.window_next,
                CASE WHEN s.deps_left = n.times
                    AND (s.weight = 0 OR (s.queue = ANY (p_queues) AND NOT s.carried AND NOT s.grouped))
                THEN (SELECT r.active AND (r.max_parallel IS NULL OR s.weight < 2) FROM runs r WHERE r.id = s.id >> 20)
                ELSE false END AS ours
            FROM steps s, LATERAL (SELECT coalesce(times[array_position(repeated, s.id)], 1) AS times) n
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
                unmet = s.unmet OR coalesce(s.id = ANY (unmet_edges), false),
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
        ), told AS (
            INSERT INTO events (run_id, "row", kind, at, data)
            SELECT x.id >> 20, (x.id & 1048575)::int, 'step.started', clock_timestamp(),
                '{"attempt": ' || x.attempt || '}'
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
        GET DIAGNOSTICS brought = ROW_COUNT;
    END IF;

    IF p_pull > brought THEN
        WITH picked AS (
            -- Take the first entries of each queue in index order, so that the whole backlog is never sorted.
            SELECT first.* FROM unnest(p_queues) q, LATERAL (
                SELECT b.queue, b.rank, b.step_id FROM backlog b
                WHERE b.queue = q
                    AND (SELECT r.active AND r.target = p_target AND r.home = p_home
                        FROM runs r WHERE r.id = b.step_id >> 20)
                    AND (p_suspects OR (SELECT s.crashes < 2 FROM steps s WHERE s.id = b.step_id))
                ORDER BY b.rank, b.step_id LIMIT p_pull - brought FOR UPDATE OF b SKIP LOCKED
            ) first
            WHERE EXISTS (SELECT 1 FROM workers w
                WHERE w.id = p_owner AND NOT w.reaped AND w.lease_until > clock_timestamp())
            ORDER BY first.rank, first.step_id LIMIT p_pull - brought
        ), gone AS (
            DELETE FROM backlog b USING picked p
            WHERE b.queue = p.queue AND b.rank = p.rank AND b.step_id = p.step_id RETURNING b.step_id
        )
        SELECT array_agg(gone.step_id) INTO pulled FROM gone;
        p_claims := CASE WHEN pulled IS NULL THEN p_claims ELSE p_claims || pulled END;
    END IF;

    IF p_claims IS NOT NULL THEN
        RETURN QUERY
        WITH claimed AS (
            UPDATE steps s SET status = 2, token = s.token + 1, owner = p_owner, due = clock_timestamp()
            FROM runs r
            WHERE s.id = ANY (p_claims) AND s.status = 1 AND (s.crashes < 2 OR p_suspects)
                AND EXISTS (SELECT 1 FROM workers w
                    WHERE w.id = p_owner AND NOT w.reaped AND w.lease_until > clock_timestamp())
                AND r.id = s.id >> 20 AND r.active AND r.target = p_target AND r.home = p_home
                AND (r.max_parallel IS NULL OR s.weight < 2)
            RETURNING s.id, s.token, s.node, s.weight, s.queue, s.attempt, s.parent, s.position, s.crashes,
                s.unmet
        ), told AS (
            INSERT INTO events (run_id, "row", kind, at, data)
            SELECT c.id >> 20, (c.id & 1048575)::int, 'step.started', clock_timestamp(),
                '{"attempt": ' || c.attempt || '}'
            FROM claimed c WHERE c.weight = 2
        )
        SELECT 1::smallint, c.id, c.token, c.node, c.weight, c.queue, c.attempt, c.parent, c.position, c.crashes,
            c.unmet
        FROM claimed c;
        GET DIAGNOSTICS brought = ROW_COUNT;
        IF brought < cardinality(p_claims) THEN
            -- A step that was taken off the backlog but could not be claimed is owed a message; nothing else would find
            -- it.
            UPDATE steps s SET due = clock_timestamp() + p_lost
            WHERE s.id = ANY (pulled) AND s.status = 1 AND s.due IS NULL;
            IF NOT EXISTS (SELECT 1 FROM workers w
                WHERE w.id = p_owner AND NOT w.reaped AND w.lease_until > clock_timestamp())
            THEN
                RETURN QUERY
                SELECT 5::smallint, NULL::bigint, NULL::int, NULL::int, NULL::smallint, NULL::smallint, NULL::smallint,
                    NULL::int, NULL::int, NULL::smallint, NULL::boolean;
                RETURN;
            END IF;
            RETURN QUERY
            UPDATE steps s SET due = clock_timestamp() + p_lost
            FROM runs r
            WHERE s.id = ANY (p_claims) AND s.status = 1 AND s.weight = 2 AND (s.crashes < 2 OR p_suspects)
                AND r.id = s.id >> 20 AND r.active AND r.target = p_target AND r.home = p_home
                AND r.max_parallel IS NOT NULL
            RETURNING 4::smallint, s.id, NULL::int, NULL::int, NULL::smallint, NULL::smallint, NULL::smallint,
                NULL::int, NULL::int, NULL::smallint, NULL::boolean;
            RETURN QUERY
            SELECT 6::smallint, s.id, NULL::int, NULL::int, NULL::smallint, NULL::smallint, NULL::smallint, NULL::int,
                NULL::int, NULL::smallint, NULL::boolean
            FROM steps s WHERE s.id = ANY (p_claims) AND s.status = 1 AND s.crashes >= 2 AND NOT p_suspects;
        END IF;
    END IF;
END $$;
